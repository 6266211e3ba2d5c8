"""A ranking from paired comparisons: the Bradley-Terry model, with intervals clustered by scenario. Pure functions.

The chance that i does better than j is 1 / (1 + exp(s_j - s_i)); a tie counts as half a win for each. Strengths sum to
zero. With ties as halves the likelihood is a quasi-likelihood, and comparisons of one scenario resemble each other, so
its own standard errors mean nothing: the intervals leave out one scenario at a time.

Shapes: M models, N comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sotopia_rl.statistics import Floats
from sotopia_rl.variance import jackknife

PRIOR_DRAWS = 1.0
"""Draws added to every pair that met, so that a model that lost every comparison has a finite strength."""
_MAX_STEPS = 200


@dataclass(frozen=True)
class Strength:
    """A model's strength, in log-odds against the average of the models."""

    value: float
    low: float | None
    high: float | None


def groups(met: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Which models are connected by comparisons, directly or through others.

    Args:
        met: [M, M] whether two models were compared.
    """
    left, found = set(range(len(met))), []
    while left:
        group, frontier = set(), {min(left)}
        while frontier:
            group |= frontier
            frontier = {j for i in frontier for j in np.flatnonzero(met[i] | met[:, i]).tolist()} - group
        found.append(sorted(group))
        left -= group
    return found


def bradley_terry(wins: Floats, *, prior_draws: float = PRIOR_DRAWS) -> Floats:
    """Strengths [M] by Newton's method, summing to zero.

    Args:
        wins: [M, M] how often the row did better than the column, ties counted as half for each.
        prior_draws: Draws added to every pair that met; with 0 it is plain maximum likelihood.

    Raises:
        ValueError: The models fall into groups that never met, or (without prior) no finite strengths exist.
    """
    met = (wins + wins.T) > 0
    if len(apart := groups(met)) > 1:
        raise ValueError(f"{len(apart)} groups of models were never compared with one another")
    won = wins + np.where(met, prior_draws / 2, 0.0)
    total = won + won.T
    strength = np.zeros(len(wins))
    for _ in range(_MAX_STEPS):
        chance = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
        score = (won - total * chance).sum(axis=1)
        weight = total * chance * (1 - chance)
        information = np.diag(weight.sum(axis=1)) - weight
        step = np.linalg.pinv(information) @ score
        strength += np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-10:
            return np.asarray(strength - strength.mean(), dtype=np.float64)
        if np.abs(strength).max() > 30:
            break
    raise ValueError("a model won or lost everything, so that its strength is not finite; use a prior")


def rank(
    comparisons: Sequence[tuple[str, str, float]],
    clusters: Sequence[str],
    *,
    prior_draws: float = PRIOR_DRAWS,
    confidence: float = 0.95,
) -> dict[str, Strength]:
    """Strengths with intervals, the strongest first.

    Args:
        comparisons: [N] (first, second, score of the first: 1 won, 0.5 tied, 0 lost).
        clusters: [N] scenario of each.

    Raises:
        ValueError: As `bradley_terry`; or there is no comparison.
    """
    if not comparisons:
        raise ValueError("there is no comparison to rank by")
    names = sorted({name for first, second, _ in comparisons for name in (first, second)})
    place = {name: i for i, name in enumerate(names)}
    first, second = np.array([place[a] for a, _, _ in comparisons]), np.array([place[b] for _, b, _ in comparisons])
    score = np.array([c[2] for c in comparisons])

    def strengths(kept: npt.NDArray[np.bool_]) -> Mapping[str, float | None]:
        wins = np.zeros((len(names), len(names)))
        np.add.at(wins, (first[kept], second[kept]), score[kept])
        np.add.at(wins, (second[kept], first[kept]), 1 - score[kept])
        return dict(zip(names, bradley_terry(wins, prior_draws=prior_draws).tolist(), strict=True))

    def strengths_or_none(kept: npt.NDArray[np.bool_]) -> Mapping[str, float | None]:
        try:
            return strengths(kept)
        except ValueError:  # without that scenario the models no longer hang together
            return dict.fromkeys(names)

    whole = strengths(np.ones(len(score), dtype=bool))
    ends = jackknife(strengths_or_none, clusters, confidence=confidence)
    found = {}
    for name in sorted(names, key=lambda name: (-(whole[name] or 0.0), name)):
        low, high = ends[name] or (None, None)
        found[name] = Strength(whole[name] or 0.0, low, high)
    return found
