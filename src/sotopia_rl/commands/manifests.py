"""`manifest list`, `freeze` and `show`: which matches an evaluation plays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from sotopia_rl.commands.flags import Flags, resolve
from sotopia_rl.commands.options import SANDBOX, Drawn, named_manifest
from sotopia_rl.console import out
from sotopia_rl.errors import ConfigError
from sotopia_rl.manifest import Manifest
from sotopia_rl.profiles import SELECTIONS, benchmarks

COMBOS_PER_SCENARIO = 5
"""Of the published profiles."""


def list_manifests() -> None:
    """Show the manifests that have a name, with their sizes."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("name", "scenarios", "matches", "played in"):
        table.add_column(name, justify="right" if name in {"scenarios", "matches"} else "left")
    for name in SANDBOX:
        table.add_row(name, "", "--count", "the offline world")
    for name, chosen in SELECTIONS.items():
        scenarios = len(benchmarks()[chosen.benchmark])
        per_scenario = 2 * chosen.num_seeds * (COMBOS_PER_SCENARIO if chosen.combos == "all" else 1)
        table.add_row(name, str(scenarios), str(scenarios * per_scenario), "published profiles (--profiles)")
    out.print(table)


def freeze_manifests(
    manifest: str,
    /,
    *,
    output: Path,
    drawn: Flags[Drawn] = Drawn(),  # noqa: B008  frozen
) -> None:
    """Write the matches of a manifest with their hash, so that everybody plays the same ones.

    Parameters
    ----------
    manifest
        A name of `sotopia-rl manifest list`, or a YAML file of one's own; see docs/evaluation.md.
    output
        File to write: .json or .yaml. An older one of other matches is not replaced.
    """
    (drawn,) = resolve(None, drawn)
    frozen = named_manifest(manifest, drawn)
    if output.suffix not in {".json", ".yaml", ".yml"}:
        raise ConfigError(f"{output}: a manifest is a .json or a .yaml file")
    if output.exists() and (there := named_manifest(str(output), Drawn())).sha256 != frozen.sha256:
        raise ConfigError(f"{output} holds {there}, other matches; choose another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    frozen.save(output)
    out.print(f"{output}: {_described(frozen)}", markup=False, soft_wrap=True)


def show_manifests(
    manifest: str,
    /,
    *,
    matches: bool = False,
    drawn: Flags[Drawn] = Drawn(),  # noqa: B008  frozen
) -> None:
    """Show what is in a manifest. A file that no longer has the hash it states is refused.

    Parameters
    ----------
    manifest
        A manifest file, or a name of `sotopia-rl manifest list`.
    matches
        List every match, not only the scenarios.
    """
    (drawn,) = resolve(None, drawn)
    found = named_manifest(manifest, drawn)
    out.print(_described(found), markup=False, soft_wrap=True)
    out.print(_matches(found) if matches else _scenarios(found))


def _described(manifest: Manifest) -> str:
    seats = Counter(match.seat for match in manifest.matches)
    seeds = sorted({match.seed for match in manifest.matches})
    shown = (
        f"{len(seeds)} seeds" if len(seeds) > 8 else f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    )
    return (
        f"{manifest.name}: {len(manifest.matches)} matches in {manifest.num_scenarios} scenarios, "
        f"first seat {seats[0]}, second seat {seats[1]}, {shown}, sha256 {manifest.sha256}"
    )


def _scenarios(manifest: Manifest) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("scenario", no_wrap=True)
    table.add_column("codename")
    table.add_column("pairs", justify="right")
    table.add_column("matches", justify="right")
    grouped: dict[str, list[int]] = {}
    for place, match in enumerate(manifest.matches):
        grouped.setdefault(match.scenario.id, []).append(place)
    for scenario_id, places in grouped.items():
        played = [manifest.matches[place] for place in places]
        pairs = {tuple(character.id for character in match.characters) for match in played}
        table.add_row(escape(scenario_id), escape(played[0].scenario.codename), str(len(pairs)), str(len(played)))
    return table


def _matches(manifest: Manifest) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("match", "scenario", "characters, the one under test marked", "seed"):
        table.add_column(name, no_wrap=name == "match")
    for match in manifest.matches:
        names = [("*" if seat == match.seat else "") + c.name for seat, c in enumerate(match.characters)]
        codename = match.scenario.codename or match.scenario.id
        table.add_row(match.id, escape(codename), escape(" and ".join(names)), str(match.seed))
    return table
