"""Simulated paired score differences with a known mean, for checking intervals and p-values.

Each world draws J scenarios. Pairs of one scenario share its difficulty and the system's effect in it;
scores are rounded and clipped to SOTOPIA's ranges, so differences are discrete, skewed and clustered.
`lopsided` worlds have 2 to 20 pairs per scenario, the others 10.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Floats = np.ndarray
World = Callable[[np.random.Generator, Floats], Floats]
"""(generator, [N] scenario index) -> [N] differences."""


def _per_scenario(draw: Callable[..., Floats], scenario: Floats) -> Floats:
    return draw(scenario.max() + 1)[scenario]


def normal(rng: np.random.Generator, scenario: Floats) -> Floats:
    return _per_scenario(lambda j: rng.normal(0.3, 1, j), scenario) + rng.normal(0, 2, len(scenario))


def goal_at_the_ceiling(rng: np.random.Generator, scenario: Floats) -> Floats:
    difficulty = _per_scenario(lambda j: rng.normal(7.5, 1.5, j), scenario)
    effect = _per_scenario(lambda j: rng.normal(0.4, 0.8, j), scenario)
    noise = rng.normal(0, 1.5, (2, len(scenario)))
    a, b = np.clip(np.rint(np.stack([difficulty + effect, difficulty]) + noise), 0, 10)
    return a - b


def relationship(rng: np.random.Generator, scenario: Floats) -> Floats:
    level = _per_scenario(lambda j: rng.normal(2, 1, j), scenario)
    effect = _per_scenario(lambda j: rng.normal(0.2, 0.5, j), scenario)
    noise = rng.normal(0, 1, (2, len(scenario)))
    a, b = np.clip(np.rint(np.stack([level + effect, level]) + noise), -5, 5)
    return a - b


def deal_or_nothing(rng: np.random.Generator, scenario: Floats) -> Floats:
    chance_b = _per_scenario(lambda j: rng.beta(2, 2, j), scenario)
    chance_a = np.clip(chance_b + _per_scenario(lambda j: rng.normal(0.1, 0.15, j), scenario), 0, 1)
    dealt = rng.random((2, len(scenario))) < np.stack([chance_a, chance_b])
    a, b = dealt * rng.integers(5, 11, dealt.shape)
    return (a - b).astype(float)


def rare_leaks(rng: np.random.Generator, scenario: Floats) -> Floats:
    chance_b = _per_scenario(lambda j: rng.beta(0.8, 6, j), scenario)
    leaked = rng.random((2, len(scenario))) < np.stack([0.6 * chance_b, chance_b])
    a, b = leaked * rng.choice([-3, -5, -10], leaked.shape)
    return (a - b).astype(float)


def few_scenarios_carry_the_gain(rng: np.random.Generator, scenario: Floats) -> Floats:
    effect = _per_scenario(lambda j: rng.exponential(1.0, j), scenario)
    return np.rint(effect + rng.normal(0, 1.5, len(scenario)))


WORLDS: dict[str, World] = {
    "normal": normal,
    "goal at the ceiling": goal_at_the_ceiling,
    "relationship": relationship,
    "deal or nothing": deal_or_nothing,
    "rare leaks": rare_leaks,
}
STRESS: dict[str, World] = {"few scenarios carry the gain": few_scenarios_carry_the_gain}
"""Exponential scenario effects: with 14 of unequal sizes no method that was tried covers 93.5%."""


def draw_scenarios(rng: np.random.Generator, num_scenarios: int, *, lopsided: bool) -> Floats:
    """[N] scenario index of each pair."""
    sizes = rng.choice([2, 4, 6, 10, 20], num_scenarios) if lopsided else np.full(num_scenarios, 10)
    return np.repeat(np.arange(num_scenarios), sizes)


def true_mean(world: World, *, lopsided: bool) -> float:
    """The mean that intervals should cover, from a million and more pairs."""
    rng = np.random.default_rng(987654321)
    scenario = draw_scenarios(rng, 200_000, lopsided=lopsided)
    return float(world(rng, scenario).mean())
