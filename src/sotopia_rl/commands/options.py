"""What several commands share: settings from defaults, file and flags; stores; finished-work summaries."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal, TypeVar

from sotopia_rl import sandbox
from sotopia_rl.config import Config, parse_config, read_yaml
from sotopia_rl.console import err, used
from sotopia_rl.errors import ConfigError
from sotopia_rl.manifest import Manifest, manifest_from
from sotopia_rl.profiles import SELECTIONS, load_profiles, selected_matches
from sotopia_rl.stages import Tally

C = TypeVar("C", bound=Config)

DEFAULT_STORE = "episodes.db"
SANDBOX = ("sandbox-train", "sandbox-held-out")
"""Manifests of the offline world, of any size."""


def resolve(flags: C, file: Path | None) -> C:
    """Settings by precedence: the class's defaults, then the file, then the flags that were given.

    Raises:
        ConfigError: The file is wrong, or the settings contradict one another.
    """
    if file is None:
        return flags
    given = flags.model_dump(include=flags.model_fields_set)
    return parse_config(type(flags), {**read_yaml(file), **given}, where=str(file))


def named_manifest(name: str, *, count: int, profiles: Path | None, seed: int) -> Manifest:
    """A manifest by name (`sandbox-train`, `sandbox-held-out`, a name of `profiles.SELECTIONS`) or from a file."""
    if name == "sandbox-train":
        return Manifest(name=name, matches=tuple(sandbox.matches("train", count, seed=seed)))
    if name == "sandbox-held-out":
        return Manifest(name=name, matches=tuple(sandbox.matches("held_out", count, seed=seed)))
    if name in SELECTIONS:
        if profiles is None:
            raise ConfigError(f"{name} is played in the published SOTOPIA profiles; give their folder with --profiles")
        played = selected_matches(load_profiles(profiles), name, seed=seed)
        return Manifest(name=name, matches=tuple(played))
    if not Path(name).exists() and not Path(name).suffix:
        near = difflib.get_close_matches(name, [*SANDBOX, *SELECTIONS], n=1)
        hint = f"did you mean {near[0]}?" if near else "`sotopia-rl manifest list` names those there are"
        raise ConfigError(f"{name}: neither a manifest's name nor a file; {hint}")
    return manifest_from(Path(name), profiles)


def finish(*tallies: Tally, failures: Literal["refuse", "count"] = "refuse") -> None:
    """Say what was done; an error where nothing succeeded, or the work was stopped.

    Args:
        failures: Whether a stage in which everything failed is an error, or the caller counts what it lacks.

    Raises:
        SotopiaRLError: Every item failed, or not every item was tried.
    """
    for tally in tallies:
        extra = used(tally.usage)
        err.print(str(tally) + (f" ({extra})" if extra else ""), markup=False, soft_wrap=True)
        for kind, message in sorted(tally.messages.items()):
            err.print(f"  {kind}: {message}", markup=False, soft_wrap=True)
    for tally in tallies:
        tally.require(some=failures == "refuse")
