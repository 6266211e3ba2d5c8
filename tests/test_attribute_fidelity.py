"""Fidelity: by hand, and on the offline world, where it must tell good annotators from bad ones."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attributed_episodes import answers
from sotopia_rl import sandbox
from sotopia_rl.attribute import AttributionConfig, attribute_all
from sotopia_rl.attribute.fidelity import Case, fidelity, spearman, top1
from sotopia_rl.episode import AgentSpec, Failure
from sotopia_rl.judge import JudgeConfig, judge_all
from sotopia_rl.simulate import Pairing, SimulateConfig, simulate

EXACT = {0: 0.0, 2: 1.0, 4: 0.5}


@pytest.mark.parametrize(
    ("given", "rho", "top"),
    [
        ({0: 0.0, 2: 1.0, 4: 0.5}, 1, 1),
        ({0: 1.0, 2: 0.0, 4: 0.5}, -1, 0),
        ({0: 1.0, 2: 1.0, 4: 1.0}, 0, 1 / 3),
        ({0: 0.0, 2: 1.0, 4: 1.0}, pytest.approx(0.866, abs=0.001), 0.5),
    ],
)
def test_fidelity_within_one_agent_by_hand(given, rho, top):
    assert spearman(given, EXACT) == rho
    assert top1(given, EXACT) == top


def test_where_all_credits_are_equal_there_is_nothing_to_find():
    assert spearman(EXACT, dict.fromkeys(EXACT, 0.5)) is None
    assert top1(EXACT, dict.fromkeys(EXACT, 0.5)) is None
    with pytest.raises(ValueError, match="nothing to measure"):
        fidelity([Case("s", EXACT, dict.fromkeys(EXACT, 0.5), 3.0)])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=8))
def test_fidelity_is_bounded_and_inside_its_interval(pairs):
    given_ = {i: a / 3 for i, (a, _) in enumerate(pairs)}
    exact = {i: b / 3 for i, (_, b) in enumerate(pairs)}
    cases = [Case("a", given_, exact, 5.0), Case("b", EXACT, EXACT, 5.0)]
    found = fidelity(cases, resamples=20)
    for interval, least in ((found.spearman, -1), (found.top1, 0), (found.reward_pearson, -1)):
        assert least <= interval.low <= interval.value <= interval.high <= 1 + 1e-9


async def _rated():
    matches = sandbox.matches("train", 24, seed=3)
    seats = (AgentSpec(model="scripted/fair"), AgentSpec(model="scripted/tough"))
    pairings = [Pairing(match=match, agents=seats) for match in matches]
    models = {f"scripted/{name}": sandbox.SCRIPTED[name]() for name in ("fair", "tough")}
    episodes = [e async for e in simulate(pairings, models.__getitem__, tag="t", config=SimulateConfig())]
    judge = sandbox.SCRIPTED["judge"]()
    return [(e, r) async for e, r in judge_all(episodes, judge, JudgeConfig(), limit=4)]


@pytest.fixture(scope="module")
def rated():
    pairs = asyncio.run(_rated())
    assert not any(isinstance(rating, Failure) for _, rating in pairs)
    return pairs


def measured(rated, annotator, **settings):
    async def collect():
        config = AttributionConfig(dimensions=("goal",), **settings)
        results = attribute_all(rated, sandbox.SCRIPTED[annotator](), config, limit=4)
        return [(item, answers(outcome)[0]) async for item, outcome in results]

    return fidelity(
        (
            Case(
                item.episode.id,
                {turn: weight / a.top_weight for turn, weight in a.by_turn().items()},
                sandbox.exact_credit(item.episode.match, item.episode.turns, item.seat, "goal"),
                item.rating.points(item.seat)["goal"],
            )
            for item, a in asyncio.run(collect())
        ),
        resamples=200,
    )


def test_the_scripted_annotator_answers_every_method_and_noise_costs_fidelity(rated):
    exact = measured(rated, "annotator", method="exact")
    assert exact.spearman.value == pytest.approx(1)
    assert exact.top1.value == 1
    direct = measured(rated, "annotator")
    assert direct.spearman.value > 0.9
    noisy = [measured(rated, f"annotator-noise-{p}").spearman for p in (25, 75, 100)]
    assert direct.spearman.value > noisy[0].value > noisy[1].value > noisy[2].value
    assert direct.spearman.low > noisy[1].high
    assert noisy[2].low < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "counterfactual"},
        {"method": "direct_normalised"},
        {"method": "goal_progress"},
        {"method": "goal_progress", "view": "online"},
        {"method": "response_only"},
        {"method": "singular"},
        {"method": "utterance_quality"},
        {"view": "online", "scale": 5},
    ],
)
def test_every_method_that_asks_runs_on_the_offline_world(rated, settings):
    assert measured(rated, "annotator", **settings).num_cases > 10


def test_a_uniform_method_says_nothing_about_which_utterance(rated):
    uniform = measured(rated, "annotator", method="uniform")
    assert uniform.spearman.value == 0
    assert uniform.top1.value < 0.6
