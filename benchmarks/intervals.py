"""Which interval for a paired difference covers its true value? The table of docs/evaluation.md.

    python benchmarks/intervals.py [--samples 4000] [--scenarios 14]

Each world of tests/paired_worlds.py is sampled many times; a method covers when its 95% interval holds the
known mean. The standard error of a share near 95% is 0.34 points with 4,000 samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from paired_worlds import STRESS, WORLDS, Floats, World, draw_scenarios, true_mean
from sotopia_rl.statistics import paired_difference

RESAMPLES = 1999
METHODS = (
    "t over pairs, no clusters",
    "percentile bootstrap",
    "bootstrap-t",
    "symmetric bootstrap-t",
    "jackknife (CR3) t",
    "CR2, Satterthwaite",
)


def intervals(differences: Floats, scenario: Floats, weights: Floats) -> list[tuple[float, float]]:
    """95% intervals of one sample, in the order of `METHODS`.

    Args:
        weights: [B, J] how often each resample drew each scenario.
    """
    sizes = np.bincount(scenario).astype(float)
    sums = np.bincount(scenario, differences)
    count, total = len(sizes), sizes.sum()
    mean = differences.mean()
    by_pair = stats.sem(differences) * stats.t.ppf(0.975, total - 1)

    residual = sums - mean * sizes
    error = np.sqrt((residual**2).sum() * count / (count - 1)) / total
    drawn = weights @ sizes
    means = (weights @ sums) / drawn
    spread = weights @ sums**2 - 2 * means * (weights @ (sums * sizes)) + means**2 * (weights @ sizes**2)
    errors = np.sqrt(np.maximum(spread, 0) * count / (count - 1)) / drawn
    t = np.where(errors > 1e-9, (means - mean) / np.maximum(errors, 1e-9), np.sign(means - mean) * 1e9)
    low_t, high_t = np.quantile(t, [0.025, 0.975], method="weibull")
    both_t = np.quantile(np.abs(t), 0.95, method="weibull")

    jackknife = (residual / (1 - sizes / total)) / total
    cr3 = np.sqrt((jackknife**2).sum() * (count - 1) / count) * stats.t.ppf(0.975, count - 1)
    ours = paired_difference(differences, [str(i) for i in scenario])
    return [
        (mean - by_pair, mean + by_pair),
        tuple(np.quantile(means, [0.025, 0.975])),
        (mean - high_t * error, mean - low_t * error),
        (mean - both_t * error, mean + both_t * error),
        (mean - cr3, mean + cr3),
        (ours.low, ours.high),
    ]


def coverage(world: World, *, scenarios: int, lopsided: bool, samples: int, seed: int = 0) -> list[float]:
    """Share of samples whose interval holds the true mean, by method."""
    truth = true_mean(world, lopsided=lopsided)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(scenarios, np.full(scenarios, 1 / scenarios), size=RESAMPLES).astype(float)
    hits = np.zeros(len(METHODS))
    for _ in range(samples):
        scenario = draw_scenarios(rng, scenarios, lopsided=lopsided)
        found = intervals(world(rng, scenario), scenario, weights)
        hits += [low <= truth <= high for low, high in found]
    return (hits / samples).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--scenarios", type=int, default=14)
    options = parser.parse_args()
    print(f"| {options.scenarios} scenarios | pairs in each | {' | '.join(METHODS)} |")
    print("|---|---|" + "---:|" * len(METHODS))
    for name, world in {**WORLDS, **STRESS}.items():
        for lopsided in (False, True):
            found = coverage(world, scenarios=options.scenarios, lopsided=lopsided, samples=options.samples)
            shares = " | ".join(f"{share:.1%}" for share in found)
            print(f"| {name} | {'2 to 20' if lopsided else '10'} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
