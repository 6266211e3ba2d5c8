"""Which of two systems does better, over the same matches against the same partners, pair by pair.

A manifest freezes what is played. A pair is one match against one partner in one setting (sampled or
greedy), played by both systems. Whatever has no score on one side is left out of the means, counted by
cause, and bounded: it never becomes a zero. The arithmetic is in `statistics.py`, the page in `report.py`;
nothing here plays or judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from sotopia_rl import __version__
from sotopia_rl.episode import Episode, Failure, Rating, Seat, other
from sotopia_rl.errors import EvaluationError
from sotopia_rl.manifest import Manifest, evaluation_pairings, load_manifest
from sotopia_rl.results import (
    GUARDS,
    METRICS,
    SCORES,
    SETTINGS,
    Decomposition,
    Effect,
    EvaluateConfig,
    Results,
    Row,
    Setting,
    SystemSummary,
    load_results,
)
from sotopia_rl.statistics import detectable_difference, failure_bounds, holm, paired_difference, sign_flip_p_value

__all__ = [
    "EvaluateConfig",
    "Manifest",
    "Played",
    "Results",
    "compare",
    "decompose",
    "evaluate",
    "evaluation_pairings",
    "load_manifest",
    "load_results",
    "metrics_of",
    "setting_of",
]

PairKey = tuple[str, str]
"""(match id, partner's model string), within one setting."""


@dataclass(frozen=True)
class Played:
    """What one system did over a manifest, in one setting or both.

    `failures` are the judge's, by episode id; an episode's own failure is in the episode.
    """

    system: str
    manifest: Manifest
    episodes: Sequence[Episode]
    ratings: Mapping[str, Rating]
    failures: Mapping[str, Failure] = field(default_factory=dict)


def metrics_of(episode: Episode, rating: Rating, seat: Seat) -> dict[str, float]:
    """Scores and guards of one seat. A guard that has no meaning in this episode is absent."""
    points = rating.points(seat)
    values = points | {"overall": rating.overall(seat), "num_turns": float(len(episode.turns))}
    if "secret" in points:
        values["secret_leaks"] = float(points["secret"] < 0)
    said = [
        turn.action.argument
        for turn in episode.utterances(seat)
        if turn.action.action_type != "leave"  # its argument is empty by convention
    ]
    if said:
        values["words_per_utterance"] = sum(len(text.split()) for text in said) / len(said)
        values["repetition"] = 1 - len({" ".join(text.casefold().split()) for text in said}) / len(said)
    own = [turn for turn in episode.turns if turn.seat == seat]
    if own:
        values["invalid_replies"] = sum(turn.attempts - 1 for turn in own) / len(own)
    return values


@dataclass(frozen=True)
class Cell:
    """One system in one setting: the metrics of each scored pair, the cause of each pair without a score."""

    system: str
    setting: Setting
    model: str
    scored: dict[PairKey, dict[str, float]]
    failed: dict[PairKey, str]

    def summary(self) -> SystemSummary:
        return SystemSummary(
            system=self.system,
            setting=self.setting,
            model=self.model,
            planned=len(self.scored) + len(self.failed),
            scored=len(self.scored),
            failures=dict(sorted(Counter(self.failed.values()).items())),
        )


def setting_of(episode: Episode) -> Setting:
    """Greedy where the system under test had temperature 0."""
    return "greedy" if episode.agents[episode.match.seat].sampling.temperature == 0 else "sampled"


def _partner(episode: Episode) -> str:
    return episode.agents[other(episode.match.seat)].model


def evaluate(
    played: Sequence[Played],
    comparisons: Sequence[tuple[str, str]],
    *,
    partners: Sequence[str] = (),
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008  frozen
    seeds: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> Results:
    """Compare systems pair by pair, in every setting that both played.

    Args:
        played: One per system.
        comparisons: (A, B) by system name; differences are A minus B.
        partners: Model strings every match was to be played against; by default those that occur. A pair
            that was not played counts as a failure of cause `not played`.
        seeds: Seeds to keep with the results (training, evaluation).

    Raises:
        EvaluationError: Manifests differ, an episode is no part of the manifest or there twice, several
            judges rated, a name is unknown, or two systems share no scored pair. With counts.
    """
    systems = {p.system: p for p in played}
    if len(systems) < len(played):
        raise EvaluationError(f"{len(played)} systems have {len(systems)} different names; name each once")
    if unknown := {name for pair in comparisons for name in pair} - set(systems):
        raise EvaluationError(f"no episodes for {sorted(unknown)}; there are {sorted(systems)}")
    manifest = _same_manifest(played)
    judge = _same_judge(played)
    panel = tuple(partners) or tuple(sorted({_partner(e) for p in played for e in p.episodes}))
    cells = {
        (name, setting): cell
        for name, p in systems.items()
        for setting in SETTINGS
        if (cell := _cell(p, setting, panel)) is not None
    }
    rows, decompositions = [], []
    scenario_of = {m.id: m.scenario.id for m in manifest.matches}
    for a, b in comparisons:
        shared = [s for s in SETTINGS if (a, s) in cells and (b, s) in cells]
        if not shared:
            raise EvaluationError(f"{a!r} and {b!r} were not played in the same setting (sampled or greedy)")
        for setting in shared:
            rows += compare(cells[a, setting], cells[b, setting], scenario_of, config=config)
        if len(shared) == len(SETTINGS):
            decompositions += decompose([cells[n, s] for n in (a, b) for s in SETTINGS], scenario_of, config=config)
    return Results(
        manifest=manifest.name,
        manifest_sha256=manifest.sha256,
        num_matches=len(manifest.matches),
        num_scenarios=manifest.num_scenarios,
        partners=panel,
        judge=judge,
        seeds=dict(seeds or {}),
        config=config,
        rows=tuple(rows),
        systems=tuple(cell.summary() for cell in cells.values()),
        decompositions=tuple(decompositions),
        notes=tuple(notes),
        package_version=__version__,
    )


def _same_manifest(played: Sequence[Played]) -> Manifest:
    if not played:
        raise EvaluationError("there is no system to evaluate")
    first = played[0]
    for p in played[1:]:
        if p.manifest.sha256 != first.manifest.sha256:
            shared = len({m.id for m in p.manifest.matches} & {m.id for m in first.manifest.matches})
            raise EvaluationError(
                f"{first.system!r} played {first.manifest} and {p.system!r} played {p.manifest}: "
                f"different manifests with {shared} matches in common; play both systems over one manifest"
            )
    return first.manifest


def _same_judge(played: Sequence[Played]) -> str:
    counts = Counter(p.ratings[e.id].judge for p in played for e in p.episodes if e.id in p.ratings)
    if not counts:
        total = sum(len(p.episodes) for p in played)
        raise EvaluationError(f"none of the {total} episodes has a rating; judge them first")
    if len(counts) > 1:
        listed = ", ".join(f"{judge} {count}" for judge, count in sorted(counts.items()))
        raise EvaluationError(f"ratings by {len(counts)} judges ({listed}); give the ratings of one judge")
    return next(iter(counts))


def _cell(p: Played, setting: Setting, partners: Sequence[str]) -> Cell | None:
    """The system's pairs in one setting; None where it played none there."""
    episodes = [e for e in p.episodes if setting_of(e) == setting]
    if not episodes:
        return None
    planned = {(m.id, partner) for m in p.manifest.matches for partner in partners}
    counts = Counter((e.match.id, _partner(e)) for e in episodes)
    if foreign := [key for key in counts if key not in planned]:
        raise EvaluationError(
            f"{p.system!r}: {len(foreign)} of {len(counts)} {setting} pairs are not in manifest {p.manifest} with "
            f"partners {', '.join(partners)}; first: match {foreign[0][0]} against {foreign[0][1]}"
        )
    if twice := [key for key, count in counts.items() if count > 1]:
        raise EvaluationError(
            f"{p.system!r}: {len(twice)} {setting} pairs have more than one episode; "
            f"first: match {twice[0][0]} against {twice[0][1]}; keep one episode of each"
        )
    models = sorted({e.agents[e.match.seat].model for e in episodes})
    if len(models) > 1:
        raise EvaluationError(f"{p.system!r}: its {setting} episodes were played by {len(models)} models: {models}")
    scored: dict[PairKey, dict[str, float]] = {}
    failed = dict.fromkeys(planned - set(counts), "not played")
    for episode in episodes:
        key = (episode.match.id, _partner(episode))
        cause = _cause(episode, p)
        if cause is None:
            scored[key] = metrics_of(episode, p.ratings[episode.id], episode.match.seat)
        else:
            failed[key] = cause
    return Cell(p.system, setting, models[0], scored, failed)


def _cause(episode: Episode, p: Played) -> str | None:
    """Why an episode has no score; None where it has one."""
    if episode.failure is not None:
        return f"{episode.status}: {episode.failure.kind}"
    if episode.id in p.ratings:
        return None
    failure = p.failures.get(episode.id)
    return "not judged" if failure is None else f"judge failed: {failure.kind}"


def compare(a: Cell, b: Cell, scenario_of: Mapping[str, str], *, config: EvaluateConfig) -> list[Row]:
    """Every metric of two systems in one setting, over the pairs that both scored.

    Raises:
        EvaluationError: No pair has a score on both sides.
    """
    keys = sorted(a.scored.keys() & b.scored.keys())
    if not keys:
        raise EvaluationError(
            f"{a.system!r} and {b.system!r} share no scored {a.setting} pair: {_counts(a)}; {_counts(b)}"
        )
    excluded = sorted((a.scored.keys() | a.failed.keys() | b.scored.keys() | b.failed.keys()) - set(keys))
    present = set(chain.from_iterable(cell.scored[key] for cell in (a, b) for key in keys))
    rows = [
        _row(metric, a, b, keys=defined, excluded=excluded, scenario_of=scenario_of, config=config)
        for metric in [*METRICS, *sorted(present - set(METRICS))]
        if (defined := [k for k in keys if metric in a.scored[k] and metric in b.scored[k]])
    ]
    families = [[r for r in rows if r.metric in GUARDS], [r for r in rows if r.metric not in GUARDS]]
    adjusted = {
        r.metric: p for family in families for r, p in zip(family, holm([f.p_value for f in family]), strict=True)
    }
    return [row.model_copy(update={"p_holm": adjusted[row.metric]}) for row in rows]


def _counts(cell: Cell) -> str:
    summary = cell.summary()
    causes = ", ".join(f"{cause} {count}" for cause, count in summary.failures.items()) or "no failure"
    return f"{cell.system!r} has {summary.scored} scores of {summary.planned} ({causes})"


def _row(
    metric: str,
    a: Cell,
    b: Cell,
    *,
    keys: Sequence[PairKey],
    excluded: Sequence[PairKey],
    scenario_of: Mapping[str, str],
    config: EvaluateConfig,
) -> Row:
    of_a = np.array([a.scored[key][metric] for key in keys])
    of_b = np.array([b.scored[key][metric] for key in keys])
    differences = (of_a - of_b).tolist()
    clusters = [scenario_of[match_id] for match_id, _ in keys]
    estimate = paired_difference(differences, clusters, confidence=config.confidence)
    error, df = estimate.standard_error, estimate.df
    bounds = _bounds(metric, a, b, differences, excluded)
    p_value = sign_flip_p_value(
        differences, clusters, rng=np.random.default_rng(config.seed), num_draws=config.num_draws
    )
    return Row(
        system_a=a.system,
        system_b=b.system,
        setting=a.setting,
        metric=metric,
        num_pairs=estimate.num_pairs,
        num_scenarios=estimate.num_clusters,
        num_excluded=len(excluded),
        mean_a=float(of_a.mean()),
        mean_b=float(of_b.mean()),
        difference=estimate.value,
        low=estimate.low,
        high=estimate.high,
        standard_error=error,
        df=df,
        p_value=p_value,
        p_holm=p_value,
        detectable=detectable_difference(error, df, power=config.power) if error and df and df >= 1 else None,
        worst=None if bounds is None else bounds[0],
        best=None if bounds is None else bounds[1],
    )


def _bounds(
    metric: str, a: Cell, b: Cell, differences: Sequence[float], excluded: Sequence[PairKey]
) -> tuple[float, float] | None:
    """Worst and best case of the difference; None for a metric without a range."""
    spec = METRICS.get(metric)
    if spec is None or spec.low is None or spec.high is None:
        return None
    unknown = []
    for key in excluded:
        low_a, high_a = _range(a, key, metric, spec.low, spec.high)
        low_b, high_b = _range(b, key, metric, spec.low, spec.high)
        unknown.append((low_a - high_b, high_a - low_b))
    return failure_bounds(differences, unknown)


def _range(cell: Cell, key: PairKey, metric: str, low: float, high: float) -> tuple[float, float]:
    value = cell.scored.get(key, {}).get(metric)
    return (low, high) if value is None else (value, value)


def decompose(cells: Sequence[Cell], scenario_of: Mapping[str, str], *, config: EvaluateConfig) -> list[Decomposition]:
    """Split A's sampled gain over B into better play and less sampling noise, for every score.

    Args:
        cells: A sampled, A greedy, B sampled, B greedy.
    """
    keys = sorted(set.intersection(*(set(cell.scored) for cell in cells)))
    if not keys:
        return []
    clusters = [scenario_of[match_id] for match_id, _ in keys]
    found = []
    for metric in SCORES:
        if not all(metric in cell.scored[key] for cell in cells for key in keys):
            continue
        a_s, a_g, b_s, b_g = (np.array([cell.scored[key][metric] for key in keys]) for cell in cells)

        def effect(values: npt.NDArray[np.float64]) -> Effect:
            return Effect.of(paired_difference(values.tolist(), clusters, confidence=config.confidence))

        found.append(
            Decomposition(
                system_a=cells[0].system,
                system_b=cells[2].system,
                metric=metric,
                num_pairs=len(keys),
                num_scenarios=len(set(clusters)),
                sampled_gain=effect(a_s - b_s),
                greedy_gain=effect(a_g - b_g),
                noise_saving=effect((a_s - a_g) - (b_s - b_g)),
                noise_cost_a=effect(a_g - a_s),
                noise_cost_b=effect(b_g - b_s),
                over_greedy_b=effect(a_s - b_g),
            )
        )
    return found
