"""Intervals cover, p-values are uniform, planned power is reached, and known methods agree."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from paired_worlds import STRESS, WORLDS, draw_scenarios, goal_at_the_ceiling, true_mean
from sotopia_rl.statistics import (
    controlled_difference,
    detectable_difference,
    failure_bounds,
    holm,
    paired_difference,
    power_for,
    required_clusters,
    sign_flip_p_value,
)


def coverage(world, *, num_scenarios, lopsided, num_samples, seed=1) -> float:
    truth = true_mean(world, lopsided=lopsided)
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(num_samples):
        scenario = draw_scenarios(rng, num_scenarios, lopsided=lopsided)
        estimate = paired_difference(world(rng, scenario), [str(i) for i in scenario])
        covered += estimate.low <= truth <= estimate.high
    return covered / num_samples


@pytest.mark.parametrize("lopsided", [False, True])
def test_intervals_cover_with_14_scenarios_in_a_quick_check(lopsided):
    found = coverage(goal_at_the_ceiling, num_scenarios=14, lopsided=lopsided, num_samples=400)
    assert 0.92 < found < 0.98  # 0.95 within about three standard errors of 400 samples


@pytest.mark.slow
@pytest.mark.parametrize("num_scenarios", [14, 40])
@pytest.mark.parametrize("lopsided", [False, True])
@pytest.mark.parametrize("name", WORLDS)
def test_intervals_cover_93_5_to_96_5_percent(name, lopsided, num_scenarios):
    found = coverage(WORLDS[name], num_scenarios=num_scenarios, lopsided=lopsided, num_samples=6000)
    assert 0.935 <= found <= 0.965


@pytest.mark.slow
def test_where_few_scenarios_carry_the_gain_coverage_is_known_to_fall_short():
    (world,) = STRESS.values()
    assert 0.89 < coverage(world, num_scenarios=14, lopsided=True, num_samples=3000) < 0.935
    assert 0.93 < coverage(world, num_scenarios=140, lopsided=False, num_samples=3000) < 0.965


def test_equal_scenarios_give_the_t_interval_of_scenario_means():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(14, 5))
    clusters = np.repeat([f"s{i}" for i in range(14)], 5)
    found = paired_difference(differences.ravel(), clusters)
    expected = stats.ttest_1samp(differences.mean(axis=1), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.df == pytest.approx(13)


def test_one_pair_per_scenario_gives_scipys_paired_t_interval():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 20))
    found = paired_difference(a - b, [str(i) for i in range(20)])
    expected = stats.ttest_rel(a, b).confidence_interval(0.9)
    at_90 = paired_difference(a - b, [str(i) for i in range(20)], confidence=0.9)
    assert (at_90.low, at_90.high) == pytest.approx((expected.low, expected.high))
    assert found.low < at_90.low < at_90.high < found.high


def test_one_pair_per_scenario_gives_statsmodels_hc2_errors_with_a_covariate():
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(2)
    x = rng.exponential(size=25)
    y = 0.4 + 0.3 * x + rng.normal(size=25) * (1 + x)
    fit = sm.OLS(y, sm.add_constant(x)).fit(cov_type="HC2")
    found = controlled_difference(y, x, [str(i) for i in range(25)])
    assert found.value == pytest.approx(fit.params[0])
    assert found.standard_error == pytest.approx(fit.bse[0])


def test_clustered_errors_approach_statsmodels_with_many_scenarios():
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(3)
    scenario = draw_scenarios(rng, 400, lopsided=True)
    y = goal_at_the_ceiling(rng, scenario)
    fit = sm.OLS(y, np.ones(len(y))).fit(cov_type="cluster", cov_kwds={"groups": scenario})
    found = paired_difference(y, [str(i) for i in scenario])
    assert found.standard_error == pytest.approx(fit.bse[0], rel=0.005)


def test_clusters_that_differ_in_size_cost_degrees_of_freedom():
    even = paired_difference([1.0, 2.0, 3.0, 5.0] * 3, list("abcd") * 3)
    uneven = paired_difference([1.0, 2.0, 3.0, 5.0] * 3, list("abcd") + list("aaaaaaaa"))
    assert even.df == pytest.approx(3)
    assert uneven.df < 2.5


def test_a_single_scenario_has_a_mean_and_no_interval():
    found = paired_difference([1.0, 2.0], ["s", "s"])
    assert (found.value, found.low, found.high, found.df) == (1.5, None, None, None)


def test_differences_that_are_all_equal_give_an_interval_of_no_width():
    found = paired_difference([0.5] * 4, list("aabb"))
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("differences", "clusters", "message"),
    [
        ([], [], "no pair"),
        ([1.0, math.nan], ["a", "b"], "1 of 2 values are not finite"),
        ([1.0], ["a", "b"], "1 outcomes"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(differences, clusters, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(differences, clusters)


def test_a_covariate_that_never_differs_is_refused():
    with pytest.raises(ValueError, match="same in every pair"):
        controlled_difference([1.0, 2.0], [3.0, 3.0], ["a", "b"])


def test_a_gain_that_is_all_length_vanishes_at_equal_length():
    rng = np.random.default_rng(4)
    longer = rng.normal(5, 2, 200)
    gain = 0.2 * longer + rng.normal(0, 0.3, 200)
    clusters = [str(i // 5) for i in range(200)]
    assert paired_difference(gain, clusters).low > 0.8
    at_equal_length = controlled_difference(gain, longer, clusters)
    assert at_equal_length.low < 0 < at_equal_length.high


# --- permutation test -------------------------------------------------------------------------------


def test_p_values_agree_with_every_sign_pattern_written_out():
    differences, clusters = [2.0, 1.0, -0.5, 3.0, 1.0, 0.25], list("aabbcd")
    sums = [3.0, 2.5, 1.0, 0.25]
    totals = [
        abs(sum(s * v for s, v in zip(signs, sums, strict=True))) for signs in itertools.product([1, -1], repeat=4)
    ]
    expected = np.mean([t >= sum(sums) - 1e-9 for t in totals])
    assert sign_flip_p_value(differences, clusters, rng=np.random.default_rng(0)) == expected


def test_p_values_agree_with_scipys_paired_permutation_test():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.5, 1, 10), rng.normal(0, 1, 10)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flip_p_value(a - b, [str(i) for i in range(10)], rng=rng) == pytest.approx(expected)


def test_drawn_patterns_come_near_the_exact_p_value():
    rng = np.random.default_rng(6)
    differences = rng.normal(0.4, 1, 30)
    drawn = sign_flip_p_value(differences, [str(i) for i in range(30)], rng=rng, num_draws=40_000)
    assert drawn == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)


@pytest.mark.parametrize("num_scenarios", [14, 24])
def test_p_values_are_uniform_under_no_difference(num_scenarios):
    rng = np.random.default_rng(7)
    found = []
    for _ in range(400):
        scenario = draw_scenarios(rng, num_scenarios, lopsided=True)
        noise = rng.normal(0, 1, num_scenarios)[scenario] + rng.normal(0, 2, len(scenario))
        found.append(sign_flip_p_value(np.rint(noise), [str(i) for i in scenario], rng=rng, num_draws=999))
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_no_difference_at_all_is_no_evidence():
    assert sign_flip_p_value([0.0, 0.0], ["a", "b"], rng=np.random.default_rng(0)) == 1.0


@given(st.lists(st.integers(-10, 10), min_size=1, max_size=30), st.integers(1, 8))
def test_p_values_do_not_depend_on_which_system_comes_first(differences, num_scenarios):
    clusters = [str(i % num_scenarios) for i in range(len(differences))]
    forward = sign_flip_p_value([float(d) for d in differences], clusters, rng=np.random.default_rng(0))
    backward = sign_flip_p_value([-float(d) for d in differences], clusters, rng=np.random.default_rng(0))
    assert forward == backward
    assert 0 < forward <= 1


# --- many metrics, power, failures ------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 13])
def test_holm_agrees_with_statsmodels(count):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    gc.collect()
    gc.freeze()  # statsmodels collects garbage at every call
    for p_values in np.random.default_rng(count).beta(0.5, 2, (4, count)).tolist():
        assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=15))
def test_adjusted_p_values_keep_their_order_and_never_shrink(p_values):
    adjusted = holm(p_values)
    assert all(q >= p for p, q in zip(p_values, adjusted, strict=True))
    ranked = [q for _, q in sorted(zip(p_values, adjusted, strict=True))]
    assert ranked == sorted(ranked)


def test_power_agrees_with_statsmodels():
    power = pytest.importorskip("statsmodels.stats.power")
    expected = power.TTestPower().power(effect_size=0.5, nobs=20, alpha=0.05)
    assert power_for(0.5, 1 / math.sqrt(20), 19) == pytest.approx(expected)


def test_required_number_agrees_with_statsmodels_for_one_pair_per_scenario():
    power = pytest.importorskip("statsmodels.stats.power")
    rng = np.random.default_rng(8)
    pilot = paired_difference(rng.normal(0, 1, 16), [str(i) for i in range(16)])
    sd = pilot.standard_error * 4
    expected = power.TTestPower().solve_power(effect_size=0.4 / sd, power=0.8, alpha=0.05)
    assert required_clusters(0.4, pilot) == math.ceil(expected)


def test_planned_power_is_reached():
    rng = np.random.default_rng(9)

    def estimate(num_scenarios, gain):
        effect = rng.normal(gain, 1, num_scenarios)
        differences = effect[:, None] + rng.normal(0, 2, (num_scenarios, 5))
        return paired_difference(differences.ravel(), np.repeat(np.arange(num_scenarios).astype(str), 5))

    planned = required_clusters(0.8, estimate(600, 0.0))
    hits = sum(estimate(planned, 0.8).low > 0 for _ in range(400))
    assert hits / 400 == pytest.approx(0.8, abs=0.06)


def test_the_detectable_difference_has_the_stated_power():
    found = detectable_difference(0.3, 13, power=0.8)
    assert power_for(found, 0.3, 13) == pytest.approx(0.8)


@given(st.floats(1.0, 60.0), st.floats(0.01, 30.0))
def test_power_is_a_chance_and_grows_with_the_difference(df, shift):
    assert 0.05 - 1e-9 <= power_for(shift, 1.0, df) <= 1 + 1e-9
    assert power_for(shift, 1.0, df) <= power_for(shift * 1.1, 1.0, df) + 1e-6


def test_a_plan_needs_a_difference_and_a_pilot_with_spread():
    pilot = paired_difference([1.0, 2.0], ["s", "s"])
    with pytest.raises(ValueError, match="fewer than two scenarios"):
        required_clusters(0.5, pilot)
    with pytest.raises(ValueError, match="above zero"):
        required_clusters(0.0, pilot)


def test_bounds_put_every_failed_pair_at_its_worst_and_best():
    assert failure_bounds([1.0, 3.0], [(-10.0, 10.0), (-2.0, 8.0)]) == (-2.0, 5.5)


@given(st.lists(st.floats(-10, 10), max_size=20), st.lists(st.floats(0, 10), max_size=20))
def test_bounds_hold_whatever_the_failed_pairs_would_have_been(differences, hidden):
    if not differences and not hidden:
        return
    low, high = failure_bounds(differences, [(0.0, 10.0)] * len(hidden))
    assert low - 1e-9 <= float(np.mean([*differences, *hidden])) <= high + 1e-9
