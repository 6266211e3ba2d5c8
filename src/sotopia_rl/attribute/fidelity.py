"""How close attributions come to the exact credit, where that is known (the offline world).

Two figures per agent, averaged over the agents whose exact credits differ from one utterance to another: Spearman's
correlation between weights and exact credits, 0 where the method gives all utterances the same; and top-1 agreement,
the chance that the utterance with the greatest weight (drawn at random from several) is one with the greatest
credit. And one figure over all utterances: Pearson's correlation of the rewards A x G, which is what a reward model
is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Weights = Mapping[int, float]
"""By turn index."""
NEAR = 1e-9


@dataclass(frozen=True)
class Case:
    """One agent on one dimension: what a method says, what is true, and the episode's score in points.

    `cluster` is what the bootstrap draws whole, for instance the scenario's id.
    """

    cluster: str
    given: Weights
    """Weights as shares of the top weight, 0..1."""
    exact: Weights
    score: float


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Fidelity:
    """See the module's text. `num_cases` are the agents that the first two are means over."""

    spearman: Interval
    top1: Interval
    reward_pearson: Interval
    num_cases: int
    num_utterances: int


def spearman(given: Weights, exact: Weights) -> float | None:
    """Within one agent; None where the exact credits are all equal, 0 where the given weights are."""
    truth = [exact[turn] for turn in given]
    if len(truth) < 2 or np.ptp(truth) < NEAR:
        return None
    weights = [given[turn] for turn in given]
    return 0.0 if np.ptp(weights) < NEAR else float(np.clip(stats.spearmanr(weights, truth).statistic, -1, 1))


def top1(given: Weights, exact: Weights) -> float | None:
    """Chance that a turn of greatest weight is one of greatest credit; None where the exact credits are all equal."""
    if len(exact) < 2 or np.ptp(list(exact.values())) < NEAR:
        return None
    best = [turn for turn, weight in given.items() if weight >= max(given.values()) - NEAR]
    right = [turn for turn in best if exact[turn] >= max(exact.values()) - NEAR]
    return len(right) / len(best)


def fidelity(cases: Iterable[Case], *, resamples: int = 1000, seed: int = 0) -> Fidelity:
    """Fidelity of one method on one dimension or several.

    Raises:
        ValueError: No agent's exact credits differ, so that there is nothing to find.
    """
    cases = list(cases)
    telling = [case for case in cases if spearman(case.given, case.exact) is not None]
    if not telling:
        raise ValueError("no agent's exact credits differ from utterance to utterance: nothing to measure")
    within = np.array([[spearman(c.given, c.exact), top1(c.given, c.exact)] for c in telling], dtype=float)
    means = [_mean_interval(column, [c.cluster for c in telling], resamples, seed) for column in within.T]
    rewards, clusters = _rewards(cases)
    return Fidelity(
        spearman=means[0],
        top1=means[1],
        reward_pearson=_pearson_interval(rewards, clusters, resamples, seed),
        num_cases=len(telling),
        num_utterances=len(rewards),
    )


def _rewards(cases: Sequence[Case]) -> tuple[np.ndarray, list[str]]:
    """Rewards by the method and by exact credit [U, 2], and the cluster of each utterance."""
    rows = [
        (case.cluster, case.given[turn] * case.score, case.exact[turn] * case.score)
        for case in cases
        for turn in case.given
    ]
    return np.array([row[1:] for row in rows], dtype=float), [row[0] for row in rows]


def _mean_interval(values: np.ndarray, clusters: Sequence[str], resamples: int, seed: int) -> Interval:
    number = np.unique(clusters, return_inverse=True)[1]
    sums, sizes = np.bincount(number, weights=values), np.bincount(number)
    times = _draws(len(sizes), resamples, seed)
    return _interval(float(values.mean()), (times @ sums) / (times @ sizes))


def _pearson_interval(xy: np.ndarray, clusters: Sequence[str], resamples: int, seed: int) -> Interval:
    """From each cluster's sums, so that a draw costs nothing but additions."""
    number = np.unique(clusters, return_inverse=True)[1]
    xy = xy - xy.mean(axis=0)
    x, y = xy.T
    columns = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(number, weights=column) for column in columns], axis=1)
    times = _draws(len(sums), resamples, seed)
    return _interval(float(_pearson(sums.sum(axis=0))), _pearson(times @ sums))


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = (n * xx - x * x) * (n * yy - y * y)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(spread > NEAR, (n * xy - x * y) / np.sqrt(np.maximum(spread, NEAR)), 0.0)
    return np.clip(found, -1, 1)


def _draws(num_clusters: int, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=resamples)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = (float(np.quantile(drawn, q)) for q in (0.025, 0.975))
    return Interval(value, min(low, value), max(high, value))
