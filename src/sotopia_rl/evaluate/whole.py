"""From what systems played to `Results`: the checks before any arithmetic, then every comparison, judge and partner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from sotopia_rl import __version__
from sotopia_rl.errors import EvaluationError
from sotopia_rl.evaluate.cells import NOT_JUDGED, Cell, Cells, Played, cause_of, cell_of, partner_of, pooled
from sotopia_rl.evaluate.noise import judge_agreement, judge_noise, spreads
from sotopia_rl.evaluate.paired import LENGTH, by_scenario, compare, decompose, shared_keys
from sotopia_rl.manifest import Manifest
from sotopia_rl.results import (
    HEADLINE,
    SCORES,
    SETTINGS,
    Decomposition,
    EvaluateConfig,
    LengthPoints,
    Part,
    Results,
    ScenarioRow,
    Setting,
    Unpaired,
)

Panel = Mapping[str, Sequence[Played]]
"""By judge, one `Played` per system."""


def evaluate(
    played: Sequence[Played],
    comparisons: Sequence[tuple[str, str]],
    *,
    partners: Sequence[str] = (),
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008  frozen
    seeds: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> Results:
    """Compare systems pair by pair as one judge saw them, in every setting that both played.

    Args:
        played: One per system.
        comparisons: (A, B) by system name; differences are A minus B.
        partners: Model strings every match was to be played against; by default those that occur. A pair
            that was not played counts as a failure of cause `not played`.
        seeds: Seeds to keep with the results (training, evaluation).

    Raises:
        EvaluationError: As `evaluate_panel`; or several judges rated.
    """
    panel = {_one_judge(played): played} if played else {}
    return evaluate_panel(panel, comparisons, partners=partners, config=config, seeds=seeds, notes=notes)


def evaluate_panel(
    panel: Panel,
    comparisons: Sequence[tuple[str, str]],
    *,
    partners: Sequence[str] = (),
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008  frozen
    seeds: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> Results:
    """Compare systems as a panel of judges saw them: pooled (`cells.pooled`), and each judge alone.

    A comparison without a scored pair stands in `Results.unpaired`, beside the rows of the others.

    Raises:
        EvaluationError: There is no system, manifests differ, an episode is no part of the manifest or there twice,
            a name is unknown, a judge rated nothing, or no comparison has a scored pair. With counts.
    """
    if not panel or not all(panel.values()):
        raise EvaluationError("there is no system to evaluate")
    played = next(iter(panel.values()))
    _check_names(played, comparisons)
    manifest = _same_manifest(played)
    _check_judges(panel)
    met = tuple(partners) or tuple(sorted({partner_of(e) for p in played for e in p.episodes}))
    by_judge = {judge: _cells(by_system, met, judge) for judge, by_system in panel.items()}
    cells = _pooled(by_judge)
    scenario_of = {m.id: m.scenario.id for m in manifest.matches}
    asked = list(dict.fromkeys(comparisons))
    ab, unpaired = _paired(cells, asked)
    headline = _headline(cells)
    return Results(
        manifest=manifest.name,
        manifest_sha256=manifest.sha256,
        num_matches=len(manifest.matches),
        num_scenarios=manifest.num_scenarios,
        partners=met,
        judge=next(iter(panel)) if len(panel) == 1 else f"mean of {', '.join(panel)}",
        judges=tuple(panel),
        seeds=dict(seeds or {}),
        config=config,
        rows=tuple(row for a, b in ab for row in compare(a, b, scenario_of, config=config)),
        unpaired=tuple(_unpaired(cells, *missing) for missing in unpaired),
        systems=tuple(cell.summary() for cell in cells.values()),
        decompositions=tuple(_decompositions(cells, asked, scenario_of, config)),
        parts=tuple(_parts(by_judge, ab, met, scenario_of, config)),
        scenarios=tuple(_scenarios(ab, manifest, scenario_of, headline)),
        lengths=tuple(_lengths(cells, headline)),
        agreement=tuple(judge_agreement(by_judge, scenario_of)),
        judge_noise=tuple(judge_noise(by_judge, scenario_of)),
        spreads=tuple(spreads(by_judge, comparisons, scenario_of, headline, confidence=config.confidence)),
        notes=tuple(notes),
        package_version=__version__,
    )


def _check_names(played: Sequence[Played], comparisons: Sequence[tuple[str, str]]) -> None:
    names = {p.system for p in played}
    if len(names) < len(played):
        raise EvaluationError(f"{len(played)} systems have {len(names)} different names; name each once")
    if unknown := {name for pair in comparisons for name in pair} - names:
        raise EvaluationError(f"no episodes for {sorted(unknown)}; there are {sorted(names)}")


def _check_judges(panel: Panel) -> None:
    for judge, played in panel.items():
        if (rated_by := _one_judge(played, judge)) != judge:
            raise EvaluationError(f"ratings by {rated_by} stand under judge {judge}")


def _same_manifest(played: Sequence[Played]) -> Manifest:
    first = played[0]
    for p in played[1:]:
        if p.manifest.sha256 != first.manifest.sha256:
            shared = len({m.id for m in p.manifest.matches} & {m.id for m in first.manifest.matches})
            raise EvaluationError(
                f"{first.system!r} played {first.manifest} and {p.system!r} played {p.manifest}: "
                f"different manifests with {shared} matches in common; play both systems over one manifest"
            )
    return first.manifest


def _one_judge(played: Sequence[Played], named: str = "") -> str:
    counts = Counter(p.ratings[e.id].judge for p in played for e in p.episodes if e.id in p.ratings)
    if not counts:
        causes = Counter(cause_of(e, p) for p in played for e in p.episodes)
        by = f" by {named}" if named else ""
        listed = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items())) or "nothing was played"
        hint = "; judge them first" if NOT_JUDGED in causes else ""
        raise EvaluationError(f"none of the {causes.total()} episodes has a rating{by}: {listed}{hint}")
    if len(counts) > 1:
        listed = ", ".join(f"{judge} {count}" for judge, count in sorted(counts.items()))
        raise EvaluationError(f"ratings by {len(counts)} judges ({listed}); give the ratings of one judge")
    return next(iter(counts))


def _cells(played: Sequence[Played], partners: Sequence[str], judge: str) -> Cells:
    found = ((p.system, setting, cell_of(p, setting, partners, judge)) for p in played for setting in SETTINGS)
    return {(system, setting): cell for system, setting, cell in found if cell is not None}


def _pooled(by_judge: Mapping[str, Cells]) -> Cells:
    first = next(iter(by_judge.values()))
    return {place: pooled([cells[place] for cells in by_judge.values()]) for place in first}


def pooled_cells(panel: Panel, partners: Sequence[str]) -> Cells:
    """By system and setting, every pair as the whole panel saw it."""
    return _pooled({judge: _cells(by_system, partners, judge) for judge, by_system in panel.items()})


def _paired(
    cells: Cells, comparisons: Sequence[tuple[str, str]]
) -> tuple[list[tuple[Cell, Cell]], list[tuple[str, str, Setting]]]:
    """Both sides of every comparison that has a scored pair, setting by setting; and the comparisons that have none.

    Raises:
        EvaluationError: None has one. With counts.
    """
    asked = [(a, b, setting) for a, b in comparisons for setting in _settings(cells, a, b)]
    unpaired = [comparison for comparison in asked if not _share(cells, *comparison)]
    if unpaired and len(unpaired) == len(asked):
        raise EvaluationError("; ".join(_why_unpaired(cells, *comparison) for comparison in unpaired))
    return [(cells[a, s], cells[b, s]) for a, b, s in asked if _share(cells, a, b, s)], unpaired


def _settings(cells: Cells, a: str, b: str) -> list[Setting]:
    """In which two systems are compared: where both played, else where one of them did."""
    played = [[s for s in SETTINGS if (name, s) in cells] for name in (a, b)]
    return [s for s in SETTINGS if s in played[0] and s in played[1]] or played[0] or played[1] or [SETTINGS[0]]


def _share(cells: Cells, a: str, b: str, setting: Setting) -> bool:
    return (a, setting) in cells and (b, setting) in cells and bool(shared_keys(cells[a, setting], cells[b, setting]))


def _unpaired(cells: Cells, a: str, b: str, setting: Setting) -> Unpaired:
    met = [cell.pairs for name in (a, b) if (cell := cells.get((name, setting)))]
    return Unpaired(system_a=a, system_b=b, setting=setting, num_excluded=len(set().union(*met)))


def _why_unpaired(cells: Cells, a: str, b: str, setting: Setting) -> str:
    of_each = [cell.counts() if (cell := cells.get((name, setting))) else f"{name!r} was not played" for name in (a, b)]
    return f"{a!r} and {b!r} share no scored {setting} pair: {'; '.join(of_each)}"


def _headline(cells: Cells) -> str:
    present = {metric for cell in cells.values() for scores in cell.scored.values() for metric in scores}
    return next((metric for metric in HEADLINE if metric in present), HEADLINE[-1])


def _decompositions(
    cells: Cells, comparisons: Sequence[tuple[str, str]], scenario_of: Mapping[str, str], config: EvaluateConfig
) -> Iterator[Decomposition]:
    """Which part of a gain is less noise in sampling, where both systems played in every setting."""
    for pair in comparisons:
        places = [(name, setting) for name in pair for setting in SETTINGS]
        if all(place in cells for place in places):
            yield from decompose([cells[place] for place in places], scenario_of, config=config)


def _parts(
    by_judge: Mapping[str, Cells],
    ab: Sequence[tuple[Cell, Cell]],
    partners: Sequence[str],
    scenario_of: Mapping[str, str],
    config: EvaluateConfig,
) -> Iterator[Part]:
    """Each judge of several alone; each partner of several alone, in the headline metrics."""
    for a, b in ab:
        for judge, cells in by_judge.items() if len(by_judge) > 1 else ():
            own = cells[a.system, a.setting], cells[b.system, b.setting]
            if shared_keys(*own):
                for row in compare(*own, scenario_of, config=config, metrics=list(SCORES)):
                    yield Part(by="judge", name=judge, row=row)
        for partner in partners if len(partners) > 1 else ():
            if any(key[1] == partner for key in shared_keys(a, b)):
                for row in compare(a, b, scenario_of, config=config, metrics=HEADLINE, partner=partner):
                    yield Part(by="partner", name=partner, row=row)


def _scenarios(
    ab: Sequence[tuple[Cell, Cell]], manifest: Manifest, scenario_of: Mapping[str, str], metric: str
) -> Iterator[ScenarioRow]:
    codenames = {m.scenario.id: m.scenario.codename for m in manifest.matches}
    for a, b in ab:
        yield from by_scenario(a, b, scenario_of, codenames, metric)


def _lengths(cells: Cells, metric: str) -> Iterator[LengthPoints]:
    for cell in cells.values():
        points = [(m[LENGTH], m[metric]) for _, m in sorted(cell.scored.items()) if LENGTH in m and metric in m]
        yield LengthPoints(system=cell.system, setting=cell.setting, metric=metric, points=tuple(points))
