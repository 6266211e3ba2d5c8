"""Where the spread of numbers comes from: variance components of crossed factors, without assuming balance.

The mean of half the squared difference of two observations is the sum of the variances of all factors in which the two
differ. So a component is a difference of two such means: over pairs of observations that differ in a factor, and
over pairs that do not. In balanced data these are the ANOVA estimators; with gaps they stay unbiased. They may fall
below zero. Intervals leave one cluster (scenario) out at a time.

Nothing here knows what a judge is; `evaluate/noise.py` does. Shapes: N observations, J clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy import special

from sotopia_rl.statistics import cluster_index

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Labels = Mapping[str, Ints]
"""By factor, the level of each observation, [N] each."""


def half_squared_difference(
    values: Floats, labels: Labels, *, same: Collection[str] = (), different: Collection[str] = ()
) -> float | None:
    """Mean of (y - y')^2 / 2 over pairs of observations alike in `same` and unlike in `different`.

    Linear in N: pairs that are unlike are those that are alike in less, by inclusion and exclusion.

    Returns:
        None where there is no such pair.
    """
    values = values - values.mean()  # else the squares cancel one another badly
    total, count = 0.0, 0
    for size in range(len(different) + 1):
        for also in combinations(sorted(different), size):
            squares, pairs = _alike(values, [labels[name] for name in (*same, *also)])
            total += (-1) ** size * squares
            count += (-1) ** size * pairs
    return total / (2 * count) if count else None


def _alike(values: Floats, columns: Sequence[Ints]) -> tuple[float, int]:
    """Sum of squared differences, and number, of the unordered pairs alike in every column."""
    group = np.zeros(len(values), dtype=np.intp)
    for column in columns:
        group = np.unique(group * (int(column.max()) + 1) + column, return_inverse=True)[1]
    sizes = np.bincount(group)
    sums, squares = np.bincount(group, values), np.bincount(group, values**2)
    return float((sizes * squares - sums**2).sum()), int((sizes * (sizes - 1) // 2).sum())


def jackknife(
    estimates: Callable[[npt.NDArray[np.bool_]], Mapping[str, float | None]],
    clusters: Sequence[str],
    *,
    confidence: float = 0.95,
) -> dict[str, tuple[float, float] | None]:
    """Intervals from leaving out one cluster at a time, with a t quantile of J - 1.

    Args:
        estimates: From which observations count, [N], to numbers by name; None where one does not exist.

    Returns:
        By name; None with fewer than three clusters, or where the number does not exist without one of them.
    """
    index = cluster_index(clusters)
    count = int(index.max()) + 1
    whole = estimates(np.ones(len(index), dtype=bool))
    if count < 3:
        return dict.fromkeys(whole)
    without = [estimates(index != j) for j in range(count)]
    quantile = float(special.stdtrit(count - 1, 0.5 + confidence / 2))

    def interval(name: str) -> tuple[float, float] | None:
        value, left = whole[name], [found[name] for found in without]
        if value is None or any(number is None for number in left):
            return None
        spread = np.array(left, dtype=np.float64)
        half = quantile * math.sqrt((count - 1) / count * float(((spread - spread.mean()) ** 2).sum()))
        return value - half, value + half

    return {name: interval(name) for name in whole}
