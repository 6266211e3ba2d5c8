"""How good a reward model is on rows it has not seen, and whether that is enough for GRPO. No torch here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sotopia_rl.episode import Record
from sotopia_rl.errors import GateError
from sotopia_rl.train.folder import read_json

Values = NDArray[np.float64]

BEST_OF = (1, 2, 4, 8, 16)
MIN_SHARING = 40
"""Held-out rows that must share their prompt with another one before prompts are what is compared."""


class CalibrationBin(Record):
    """Rows with similar predictions."""

    rows: int
    predicted: float
    """Mean prediction."""
    actual: float
    """Mean target."""


class BestOfN(Record):
    """What is gained by taking the reply that the model likes best out of `n` to the same prompt."""

    n: int
    chosen: float
    """Mean target of the chosen reply."""
    oracle: float
    """Mean target of the truly best one."""
    random: float
    """Mean target of a random one."""
    groups: int
    """Prompts with at least `n` replies."""


class OutputReport(Record):
    """One output of a reward model against its held-out targets, all on 0..1. None: not defined here."""

    name: str
    rows: int
    mse: float | None
    baseline_mse: float | None
    """Of always predicting the mean target of the training rows."""
    pearson: float | None
    spearman: float | None
    pairwise_accuracy: float | None
    """Share of pairs of replies in one group that the model puts in the right order; ties count half."""
    pairs: int
    calibration: tuple[CalibrationBin, ...]
    best_of_n: tuple[BestOfN, ...]


class RewardReport(Record):
    """The report of a reward model, one entry per output."""

    groups: Literal["prompt", "scenario", "turn"]
    """What pairs and best-of-N compare: replies to one `prompt`; where hardly any rows share a prompt, replies at
    the same turn of one `scenario`; failing that too, replies at the same `turn` of any, a much weaker test."""
    held_out_episodes: int
    outputs: tuple[OutputReport, ...]

    @property
    def spearman(self) -> float | None:
        """The lowest rank correlation of any output; None where one is undefined."""
        values = [output.spearman for output in self.outputs]
        return None if None in values or not values else min(v for v in values if v is not None)


def check_gate(adapter: Path, min_spearman: float | None) -> None:
    """Refuse a reward model that is not good enough to be followed.

    Raises:
        GateError: Its report is missing, or its held-out rank correlation is below `min_spearman`.
    """
    if min_spearman is None:
        return
    path = adapter / "report.json"
    switch_off = "train a better one, or switch the gate off (gate_min_spearman: null)"
    if not path.is_file():
        raise GateError(f"{adapter}: the reward model has no report.json, so nothing is known of it; {switch_off}")
    found = RewardReport.model_validate(read_json(path)).spearman
    if found is None:
        raise GateError(f"{path}: no held-out rank correlation (too few held-out rows); {switch_off}")
    if found < min_spearman:
        raise GateError(f"{path}: held-out Spearman correlation {found:.3f} is below {min_spearman}; {switch_off}")


def report_output(
    name: str, predicted: Sequence[float], actual: Sequence[float], groups: Sequence[Hashable], *, train_mean: float
) -> OutputReport:
    """Compare held-out predictions with their targets.

    Args:
        predicted: [N]
        actual: [N] targets on 0..1.
        groups: [N] replies with equal keys are compared with each other.
        train_mean: Mean target of the training rows.
    """
    p, a = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    members = _members(groups)
    right, pairs = _ordered_pairs(p, a, members)
    return OutputReport(
        name=name,
        rows=len(p),
        mse=_mean((p - a) ** 2),
        baseline_mse=_mean((train_mean - a) ** 2),
        pearson=_correlation(stats.pearsonr, p, a),
        spearman=_correlation(stats.spearmanr, p, a),
        pairwise_accuracy=right / pairs if pairs else None,
        pairs=pairs,
        calibration=calibration(p, a),
        best_of_n=best_of_n(p, a, members),
    )


def group_keys(
    prompts: Sequence[Hashable], scenarios: Sequence[Hashable], turns: Sequence[Hashable]
) -> tuple[Literal["prompt", "scenario", "turn"], Sequence[Hashable]]:
    """What to compare: replies to one prompt where enough share one, else at one place of a scenario, else of any."""
    if _sharing(prompts) >= MIN_SHARING:
        return "prompt", prompts
    if _sharing(scenarios) >= MIN_SHARING:
        return "scenario", scenarios
    return "turn", turns


def _sharing(keys: Sequence[Hashable]) -> int:
    """How many rows share their key with another one."""
    return sum(len(group) for group in _members(keys) if len(group) > 1)


def calibration(predicted: Values, actual: Values, bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Equally filled bins by prediction, lowest first."""
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return tuple(
        CalibrationBin(rows=len(part), predicted=float(predicted[part].mean()), actual=float(actual[part].mean()))
        for part in parts
    )


def best_of_n(predicted: Values, actual: Values, members: Iterable[Sequence[int]]) -> tuple[BestOfN, ...]:
    """The exact expectation over all choices of `n` replies out of each group, for growing `n`."""
    groups = [np.asarray(group) for group in members]
    curve = []
    for n in BEST_OF:
        fitting = [group for group in groups if len(group) >= max(n, 2)]
        if not fitting:
            break
        curve.append(
            BestOfN(
                n=n,
                chosen=float(np.mean([expected_best(predicted[g], actual[g], n) for g in fitting])),
                oracle=float(np.mean([expected_best(actual[g], actual[g], n) for g in fitting])),
                random=float(np.mean([actual[g].mean() for g in fitting])),
                groups=len(fitting),
            )
        )
    return tuple(curve)


def expected_best(scores: Values, values: Values, n: int) -> float:
    """Mean value of the reply with the highest score among `n` drawn without replacement."""
    ranked = values[np.argsort(scores, kind="stable")]
    chances = [math.comb(rank, n - 1) / math.comb(len(ranked), n) for rank in range(len(ranked))]
    return float(np.dot(ranked, chances))


def _members(groups: Sequence[Hashable]) -> list[list[int]]:
    by_key: dict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(groups):
        by_key[key].append(place)
    return list(by_key.values())


def _ordered_pairs(predicted: Values, actual: Values, members: Iterable[Sequence[int]]) -> tuple[float, int]:
    right, pairs = 0.0, 0
    for group in members:
        for i, j in combinations(group, 2):
            if actual[i] != actual[j]:
                pairs += 1
                agreement = (predicted[i] - predicted[j]) * (actual[i] - actual[j])
                right += 0.5 if agreement == 0 else float(agreement > 0)
    return right, pairs


def _correlation(measure: Callable[[Values, Values], Any], predicted: Values, actual: Values) -> float | None:
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return None
    return float(measure(predicted, actual).statistic)


def _mean(values: Values) -> float | None:
    return float(values.mean()) if len(values) else None
