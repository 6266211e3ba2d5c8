"""Bradley-Terry strengths agree with known solutions, and their intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_rl.ranking import bradley_terry, groups, rank


def test_two_models_have_the_log_odds_of_their_wins():
    strengths = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]), prior_draws=0)
    assert strengths[0] - strengths[1] == pytest.approx(math.log(3))
    assert strengths.sum() == pytest.approx(0)


def test_three_models_in_a_consistent_ratio_give_that_ratio():
    ratio = np.array([4.0, 2.0, 1.0])
    wins = 70 * ratio[:, None] / (ratio[:, None] + ratio[None, :]) * (1 - np.eye(3))
    found = bradley_terry(wins, prior_draws=0)
    assert found == pytest.approx(np.log(ratio) - np.log(ratio).mean())


def drawn(rng, *, models, scenarios, per_pair, truth=None, spread=0.0):
    """Comparisons of every pair in every scenario, a quarter of them tied where it is close."""
    truth = np.zeros(models) if truth is None else np.asarray(truth)
    found, clusters = [], []
    for s in range(scenarios):
        effect = truth + rng.normal(0, spread, models)
        for i in range(models):
            for j in range(i + 1, models):
                for _ in range(per_pair):
                    won = rng.random() < 1 / (1 + math.exp(effect[j] - effect[i]))
                    tied = rng.random() < 0.25
                    found.append((f"m{i}", f"m{j}", 0.5 if tied else float(won)))
                    clusters.append(f"s{s}")
    return found, clusters


def test_ties_as_halves_agree_with_statsmodels():
    sm = pytest.importorskip("statsmodels.api")
    comparisons, clusters = drawn(np.random.default_rng(0), models=4, scenarios=20, per_pair=3, truth=[1, 0.5, 0, -1])
    design = np.zeros((len(comparisons), 4))
    for row, (first, second, _) in enumerate(comparisons):
        design[row, int(first[1])], design[row, int(second[1])] = 1, -1
    fit = sm.GLM([c[2] for c in comparisons], design[:, 1:], family=sm.families.Binomial()).fit()
    expected = np.array([0.0, *fit.params])
    found = rank(comparisons, clusters, prior_draws=0)
    assert [found[f"m{i}"].value for i in range(4)] == pytest.approx(expected - expected.mean(), abs=1e-6)


def test_intervals_come_near_statsmodels_clustered_ones_with_many_scenarios():
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(1)
    comparisons, clusters = drawn(rng, models=2, scenarios=150, per_pair=4, truth=[0.4, -0.4], spread=0.7)
    score = np.array([c[2] for c in comparisons])
    fit = sm.GLM(score, np.ones((len(score), 1)), family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": np.array([int(c[1:]) for c in clusters])}
    )
    found = rank(comparisons, clusters, prior_draws=0)["m0"]
    assert found.value == pytest.approx(fit.params[0] / 2, abs=1e-6)
    assert found.high - found.low == pytest.approx(2 * 1.96 * fit.bse[0] / 2, rel=0.04)


def test_intervals_hold_the_truth_with_14_scenarios():
    rng = np.random.default_rng(2)
    reference, _ = drawn(rng, models=3, scenarios=4000, per_pair=1, truth=[0.8, 0, -0.8], spread=0.6)
    truth = rank(reference, ["one"] * len(reference))
    covered = 0
    for _ in range(70):
        comparisons, clusters = drawn(rng, models=3, scenarios=14, per_pair=4, truth=[0.8, 0, -0.8], spread=0.6)
        found = rank(comparisons, clusters)
        covered += sum(found[name].low <= truth[name].value <= found[name].high for name in truth)
    assert 0.9 < covered / 210 < 0.99


def test_a_model_that_loses_everything_has_a_finite_strength_only_with_a_prior():
    wins = np.array([[0.0, 8.0], [0.0, 0.0]])
    assert bradley_terry(wins)[0] == pytest.approx(math.log(8.5 / 0.5) / 2)
    with pytest.raises(ValueError, match="not finite"):
        bradley_terry(wins, prior_draws=0)


def test_models_that_never_met_cannot_be_ranked():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 3
    assert groups(wins > 0) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="2 groups of models were never compared"):
        bradley_terry(wins)


def test_models_that_met_only_through_a_third_are_ranked():
    found = rank([("a", "b", 1.0), ("b", "c", 1.0), ("a", "b", 0.5), ("b", "c", 0.5)], list("xyxy"))
    assert list(found) == ["a", "b", "c"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0])), max_size=40)
)
def test_strengths_do_not_depend_on_who_is_named_first(comparisons):
    met = [(f, s, score) for f, s, score in comparisons if f != s] + [("a", "b", 0.5), ("b", "c", 0.5)]
    clusters = [str(i % 4) for i in range(len(met))]
    forward = rank(met, clusters)
    backward = rank([(s, f, 1 - score) for f, s, score in met], clusters)
    assert {n: s.value for n, s in forward.items()} == pytest.approx(
        {n: s.value for n, s in backward.items()}, abs=1e-8
    )
    assert sum(s.value for s in forward.values()) == pytest.approx(0, abs=1e-8)


def test_nothing_to_rank_by_is_refused():
    with pytest.raises(ValueError, match="no comparison"):
        rank([], [])
