"""Two systems over the pairs that both scored: every metric with its interval, and gains split into play and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from sotopia_rl.errors import EvaluationError
from sotopia_rl.evaluate.cells import Cell, PairKey
from sotopia_rl.results import GUARDS, METRICS, SCORES, Decomposition, Effect, EvaluateConfig, Row, ScenarioRow
from sotopia_rl.statistics import (
    Estimate,
    controlled_difference,
    detectable_difference,
    failure_bounds,
    holm,
    paired_difference,
    required_clusters,
    sign_flip_p_value,
)

LENGTH = "words_per_utterance"


def compare(
    a: Cell,
    b: Cell,
    scenario_of: Mapping[str, str],
    *,
    config: EvaluateConfig,
    metrics: Sequence[str] | None = None,
    partner: str | None = None,
) -> list[Row]:
    """Metrics of two systems in one setting, over the pairs that both scored.

    Args:
        metrics: Only these; all that are there by default.
        partner: Only the pairs against this one.

    Raises:
        EvaluationError: No pair has a score on both sides.
    """
    keys = [k for k in shared_keys(a, b) if partner in (None, k[1])]
    if not keys:
        against = f" against {partner}" if partner else ""
        raise EvaluationError(
            f"{a.system!r} and {b.system!r} share no scored {a.setting} pair{against}: {a.counts()}; {b.counts()}"
        )
    excluded = sorted(k for k in (a.pairs | b.pairs) - set(keys) if partner in (None, k[1]))
    present = set(chain.from_iterable(cell.scored[key] for cell in (a, b) for key in keys))
    wanted = [*METRICS, *sorted(present - set(METRICS))] if metrics is None else metrics
    rows = [
        _row(metric, a, b, keys=defined, excluded=excluded, scenario_of=scenario_of, config=config)
        for metric in wanted
        if (defined := [k for k in keys if metric in a.scored[k] and metric in b.scored[k]])
    ]
    families = [[r for r in rows if r.metric in GUARDS], [r for r in rows if r.metric not in GUARDS]]
    adjusted = {
        r.metric: p for family in families for r, p in zip(family, holm([f.p_value for f in family]), strict=True)
    }
    return [row.model_copy(update={"p_holm": adjusted[row.metric]}) for row in rows]


def shared_keys(a: Cell, b: Cell) -> list[PairKey]:
    """The pairs that both scored, in order."""
    return sorted(a.scored.keys() & b.scored.keys())


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
        equal_length=None
        if metric in GUARDS
        else _at_equal_length(metric, a, b, keys=keys, scenario_of=scenario_of, config=config),
        required_scenarios=None if metric in GUARDS else _required(estimate, config),
    )


def _required(estimate: Estimate, config: EvaluateConfig) -> int | None:
    if not estimate.standard_error or not estimate.df or estimate.df < 1:
        return None
    return required_clusters(config.wanted_points, estimate, power=config.power)


def _at_equal_length(
    metric: str,
    a: Cell,
    b: Cell,
    *,
    keys: Sequence[PairKey],
    scenario_of: Mapping[str, str],
    config: EvaluateConfig,
) -> Effect | None:
    """The difference at equal words per utterance; None where both are always equally long."""
    spoken = [k for k in keys if LENGTH in a.scored[k] and LENGTH in b.scored[k]]
    longer = [a.scored[k][LENGTH] - b.scored[k][LENGTH] for k in spoken]
    if not longer or max(longer) == min(longer):
        return None
    gains = [a.scored[k][metric] - b.scored[k][metric] for k in spoken]
    clusters = [scenario_of[match_id] for match_id, _ in spoken]
    return Effect.of(controlled_difference(gains, longer, clusters, confidence=config.confidence))


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


def by_scenario(
    a: Cell, b: Cell, scenario_of: Mapping[str, str], codenames: Mapping[str, str], metric: str
) -> list[ScenarioRow]:
    """Mean difference in each scenario, the smallest first."""
    found: dict[str, list[float]] = {}
    for key in shared_keys(a, b):
        if metric in a.scored[key] and metric in b.scored[key]:
            found.setdefault(scenario_of[key[0]], []).append(a.scored[key][metric] - b.scored[key][metric])
    rows = [
        ScenarioRow(
            system_a=a.system,
            system_b=b.system,
            setting=a.setting,
            metric=metric,
            scenario_id=scenario,
            codename=codenames.get(scenario, ""),
            num_pairs=len(differences),
            difference=float(np.mean(differences)),
        )
        for scenario, differences in found.items()
    ]
    return sorted(rows, key=lambda row: (row.difference, row.scenario_id))


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
