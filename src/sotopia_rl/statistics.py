"""Numbers for paired comparisons over few scenarios: intervals, tests, power, bounds. Pure functions.

Pairs from one scenario resemble each other, so a scenario is the unit that is sampled: every standard
error here is clustered. The interval is the cluster-robust t interval with the CR2 correction (Bell and
McCaffrey 2002) and Satterthwaite degrees of freedom. It was chosen by simulation among six methods
because it covers near 95% with 14 scenarios of unequal sizes and skewed, discrete scores, where the
percentile bootstrap covers 88 to 92% (`docs/evaluation.md`, `tests/test_statistics.py`).

Nothing here knows what an episode is; `evaluate/` does.

Shapes: N pairs, J clusters (scenarios), K regressors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special  # scipy.stats says the same a hundred times slower

Floats = npt.NDArray[np.float64]

MAX_EXACT_CLUSTERS = 16
"""Up to so many clusters every sign pattern is enumerated (65,536); beyond, patterns are drawn."""


@dataclass(frozen=True)
class Estimate:
    """An estimate with its clustered interval.

    `low` and `high` are None where no interval exists: with fewer than two clusters, or when the
    clusters leave no residual degree of freedom. With no variation at all (every difference the same)
    they equal `value`, which says that the data show no spread, not that there is none.
    """

    value: float
    low: float | None
    high: float | None
    standard_error: float | None
    df: float | None
    num_pairs: int
    num_clusters: int


def paired_difference(differences: Sequence[float], clusters: Sequence[str], *, confidence: float = 0.95) -> Estimate:
    """Mean of paired differences, every pair weighing the same, with its clustered interval.

    Args:
        differences: [N] score of one system minus score of the other.
        clusters: [N] scenario of each pair.

    Raises:
        ValueError: There is no pair, a difference is not finite, or the lengths differ.
    """
    y = _finite(differences)
    return regression_coefficient(y, np.ones((len(y), 1)), clusters, confidence=confidence)


def controlled_difference(
    differences: Sequence[float],
    covariate_differences: Sequence[float],
    clusters: Sequence[str],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Mean difference where the covariate (for example words per utterance) does not differ.

    The intercept of a least-squares line of score difference on covariate difference. It asks what
    would remain at equal length; it is no proof that length caused the rest.

    Raises:
        ValueError: As `paired_difference`, or the covariate is the same in every pair.
    """
    y, x = _finite(differences), _finite(covariate_differences)
    if np.ptp(x) == 0:
        raise ValueError("the covariate difference is the same in every pair; nothing can be controlled for")
    return regression_coefficient(y, np.column_stack([np.ones(len(y)), x]), clusters, confidence=confidence)


def regression_coefficient(y: Floats, design: Floats, clusters: Sequence[str], *, confidence: float = 0.95) -> Estimate:
    """First least-squares coefficient, with CR2 standard error and Satterthwaite degrees of freedom.

    Bell and McCaffrey (2002); notation of Pustejovsky and Tipton (2018), identity working model.

    Args:
        y: [N] outcomes.
        design: [N, K] regressors.
        clusters: [N] cluster of each row.

    Raises:
        ValueError: No row, lengths that differ, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if len(y) == 0 or len(y) != len(clusters) or len(y) != len(design):
        raise ValueError(f"{len(y)} outcomes, {len(design)} rows of regressors, {len(clusters)} clusters")
    index = cluster_index(clusters)
    num_clusters = int(index.max()) + 1
    bread: Floats = np.asarray(np.linalg.pinv(design.T @ design), dtype=np.float64)
    beta = bread @ design.T @ y
    residual = y - design @ beta
    if num_clusters < 2:
        return Estimate(float(beta[0]), None, None, None, None, len(y), num_clusters)
    # CR2 takes (I - H_jj)^(-1/2), of a cluster's size, times its rows X_j. With H_jj = A A', A = X_j root and
    # root = bread^(1/2), that is X_j root (I - A'A)^(-1/2) root^(-1): all that has to be inverted is K by K.
    root = _root(bread)
    moments = _sums(design[:, :, None] * design[:, None, :], index, num_clusters)  # [J, K, K] X_j'X_j
    adjusted = root @ _inverse_root(root @ moments @ root) @ root[0]  # [J, K] what X_j is multiplied with
    loadings = np.einsum("jkl,jl->jk", moments, adjusted)
    scores = np.einsum("jk,jk->j", _sums(design * residual[:, None], index, num_clusters), adjusted)
    norms = np.einsum("jk,jk->j", loadings, adjusted)
    gram = np.diag(norms) - loadings @ bread @ loadings.T  # [J, J], Satterthwaite's quadratic form
    total = float((gram**2).sum())
    df = float(np.trace(gram)) ** 2 / total if total > 0 else 0.0
    error = math.sqrt(float(scores @ scores))
    if df < 0.5:  # a t quantile below half a degree of freedom is astronomically wide and means nothing
        return Estimate(float(beta[0]), None, None, error, df, len(y), num_clusters)
    half = float(special.stdtrit(df, 0.5 + confidence / 2)) * error
    value = float(beta[0])
    return Estimate(value, value - half, value + half, error, df, len(y), num_clusters)


def _sums(values: Floats, index: npt.NDArray[np.intp], num_clusters: int) -> Floats:
    """[J, ...] sums of the rows [N, ...] of each cluster."""
    found = np.zeros((num_clusters, *values.shape[1:]))
    np.add.at(found, index, values)
    return found


def _root(matrix: Floats) -> Floats:
    """The square root of a symmetric matrix [K, K] without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T, dtype=np.float64)


def _inverse_root(hats: Floats) -> Floats:
    """[J, K, K] (I - hat)^(-1/2) of each, the pseudo-inverse where a direction is fitted exactly."""
    values, vectors = np.linalg.eigh(np.eye(hats.shape[-1]) - hats)
    keep = values > 1e-10
    roots = np.where(keep, 1 / np.sqrt(np.where(keep, values, 1.0)), 0.0)
    return np.asarray((vectors * roots[:, None, :]) @ np.swapaxes(vectors, 1, 2), dtype=np.float64)


def cluster_index(clusters: Sequence[str]) -> npt.NDArray[np.intp]:
    """[N] cluster names as 0..J-1, in order of first appearance."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in clusters], dtype=np.intp)


def _finite(values: Sequence[float] | Floats) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError("there is no pair to compare")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {len(array)} values are not finite")
    return array


def sign_flip_p_value(
    differences: Sequence[float],
    clusters: Sequence[str],
    *,
    rng: np.random.Generator,
    num_draws: int = 20_000,
) -> float:
    """Two-sided permutation p-value: were the two systems' labels exchangeable within a scenario?

    The signs of whole clusters are flipped and the mean difference recomputed. Exact up to
    `MAX_EXACT_CLUSTERS` clusters that can change it; beyond, `num_draws` patterns are drawn and the
    observed one counted among them, so that the p-value stays valid (Phipson and Smyth 2010).

    Raises:
        ValueError: There is no pair, or a difference is not finite.
    """
    y = _finite(differences)
    sums = np.bincount(cluster_index(clusters), weights=y).astype(np.float64)
    sums = sums[np.abs(sums) > 1e-12 * max(1.0, float(np.abs(y).max()))]
    if len(sums) == 0:
        return 1.0
    threshold = abs(float(sums.sum())) * (1 - 1e-9)  # equal up to rounding counts as equal
    if len(sums) <= MAX_EXACT_CLUSTERS:
        return float(np.mean(np.abs(_all_signed_sums(sums)) >= threshold))
    extreme = 0
    for start in range(0, num_draws, 4096):
        signs = rng.integers(0, 2, size=(min(4096, num_draws - start), len(sums))) * 2.0 - 1.0
        extreme += int((np.abs(signs @ sums) >= threshold).sum())
    return (extreme + 1) / (num_draws + 1)


def _all_signed_sums(sums: Floats) -> Floats:
    """[2^(J-1)] every signed sum with the first sign fixed; the others mirror these."""
    totals = sums[:1]
    for value in sums[1:]:
        totals = np.concatenate([totals + value, totals - value])
    return totals


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of any false claim among them stays below the level."""
    count = len(p_values)
    adjusted, running = [0.0] * count, 0.0
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def power_for(wanted: float, standard_error: float, df: float, *, level: float = 0.05) -> float:
    """Chance that a two-sided t test finds a true difference of `wanted`."""
    if standard_error <= 0:
        raise ValueError("power needs a standard error above zero")
    critical = float(special.stdtrit(df, 1 - level / 2))
    shift = wanted / standard_error
    other_sign = 0.0 if shift > 6 else float(special.nctdtr(df, shift, -critical))  # below 1e-9, and scipy may say NaN
    return 1 - float(special.nctdtr(df, shift, critical)) + other_sign


def detectable_difference(standard_error: float, df: float, *, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference that a comparison of this precision finds with chance `power`."""

    def shortfall(difference: float) -> float:
        return power_for(difference, standard_error, df, level=level) - power

    high = 3 * standard_error
    while shortfall(high) < 0:
        high *= 2
    return float(optimize.brentq(shortfall, 0.0, high, xtol=1e-6 * standard_error))


def required_clusters(
    wanted: float,
    pilot: Estimate,
    *,
    power: float = 0.8,
    level: float = 0.05,
    at_most: int = 1_000_000,
) -> int | None:
    """How many scenarios (with as many pairs in each as in the pilot) find a true difference of `wanted`.

    The standard error shrinks with the root of the number of scenarios, the degrees of freedom grow with it.

    Returns:
        The smallest such number of at least 2, or None above `at_most`.

    Raises:
        ValueError: `wanted` is not above zero, or the pilot has no interval.
    """
    if wanted <= 0:
        raise ValueError("the wanted difference must be above zero")
    if pilot.standard_error is None or pilot.df is None:
        raise ValueError("a pilot of fewer than two scenarios cannot plan a sample")
    if pilot.standard_error == 0:
        return 2
    spread = pilot.standard_error * math.sqrt(pilot.num_clusters)
    df_share = pilot.df / (pilot.num_clusters - 1)

    def enough(count: int) -> bool:
        df = max(1.0, df_share * (count - 1))
        return power_for(wanted, spread / math.sqrt(count), df, level=level) >= power

    low, high = 1, 2
    while not enough(high):
        low, high = high, high * 2
        if high > at_most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def failure_bounds(differences: Sequence[float], unknown: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean difference if every failed pair had gone as badly, or as well, as its range allows.

    Args:
        differences: [N] differences of the pairs that have scores.
        unknown: Lowest and highest possible difference of each pair that has none.

    Raises:
        ValueError: There is neither a difference nor a failed pair.
    """
    count = len(differences) + len(unknown)
    if count == 0:
        raise ValueError("there is no pair to bound")
    known = math.fsum(differences)
    low = known + math.fsum(low for low, _ in unknown)
    high = known + math.fsum(high for _, high in unknown)
    return low / count, high / count
