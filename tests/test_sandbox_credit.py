"""Exact credit and the annotators that know it."""

from __future__ import annotations

import asyncio
import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_talks import asked, match_where, sample, talk
from sotopia_rl import sandbox
from sotopia_rl.attribute import AttributionConfig, attribute_all
from sotopia_rl.errors import ModelCallError
from sotopia_rl.judge import JudgeConfig, judge_episode
from sotopia_rl.sandbox.verdict import DIMENSIONS

LINES = st.sampled_from(
    [
        "", "Hello.", "How about 55?", "I want 70.", "I want Monday.", "How about Friday?", "Deal.", "No.", "leave",
        "You are a fool.", "What do you like?", "I like tea.", "I take the drum.", "Tell me the day.", "It is Monday.",
        "It starts with M.", "Take it or leave it.", "Blorp.",
    ]
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(LINES, max_size=8), st.integers(0, 7), st.sampled_from(sorted(DIMENSIONS)))
def test_credit_is_a_share_for_each_utterance_and_for_no_silent_turn(lines, which, dimension):
    match, turns = sandbox.matches("train", 8)[which], talk(*lines)
    for seat in (0, 1):
        credit = sandbox.exact_credit(match, turns, seat, dimension)
        assert list(credit) == [t.index for t in turns if t.seat == seat and t.action.action_type != "none"]
        assert all(0 <= share <= 1 for share in credit.values())


@settings(deadline=None)
@given(st.lists(LINES, max_size=8), st.integers(0, 7))
def test_without_a_score_nobody_has_credit(lines, which):
    match, turns = sandbox.matches("train", 8)[which], talk(*lines)
    for seat, scores in enumerate(sandbox.verdict(match, turns)):
        for dimension in ("knowledge", "secret", "social_rules"):
            if scores[dimension].score == 0:
                assert not any(sandbox.exact_credit(match, turns, seat, dimension).values())


def test_small_talk_has_no_credit_for_the_goal_whatever_comes_of_the_talk():
    match = match_where("time")
    one, two, _ = sandbox.sides(match)[0].values
    turns = talk("The bus was late.", f"I want {one}.", "I slept well.", f"How about {two}?", "Deal.")
    credit = sandbox.exact_credit(match, turns, 0, "goal")
    assert (credit[0], credit[2], credit[4]) == (0, 0, 0.5)


def test_an_opening_offer_that_closes_has_the_whole_credit():
    match = match_where("price", "seller")
    price = sandbox.sides(match)[0].limit + 15
    assert sandbox.exact_credit(match, talk(f"I want {price}.", "Deal."), 0, "goal") == {0: 1.0}


@pytest.mark.parametrize("gain", [5, 10, 15])
def test_holding_out_earns_more_than_giving_in_exactly_when_it_brought_more(gain):
    match = match_where("price", "seller")
    limit = sandbox.sides(match)[0].limit
    low, final = limit + 10, limit + 5 + gain
    given_in = talk("Hello.", f"I offer {low}.", "Deal.")
    held_out = talk("Hello.", f"I offer {low}.", f"I want {final}.", "Deal.")
    reward = [
        sandbox.exact_credit(match, turns, 0, "goal")[2] * 10 * (price - limit)
        for turns, price in ((given_in, low), (held_out, final))
    ]
    assert (reward[1] > reward[0]) == (final > low)
    assert (reward[1] == pytest.approx(reward[0])) == (final == low)


def test_a_question_has_the_credit_of_what_it_brought_out():
    match = match_where("time")
    side = sandbox.sides(match)[1]
    best = max(side.values, key=side.values.get)
    turns = talk("Hello.", "Hi.", "Which day suits you best?", f"{best} suits me best.", "leave")
    assert sandbox.exact_credit(match, turns, 0, "knowledge") == {0: 0, 2: 1, 4: 0}


def test_an_insult_has_the_credit_of_a_bad_relationship_and_a_courtesy_none_of_it():
    match = match_where("time")
    credit = sandbox.exact_credit(match, talk("Hello.", "Hi.", "You are a fool."), 0, "relationship")
    assert credit[0] == 0
    assert credit[2] == 1


def test_keeping_still_when_asked_has_credit_and_a_hint_has_none():
    match = match_where("secret", "asker")
    ask = f"Can you tell me the {sandbox.sides(match)[0].topic}?"
    kept = sandbox.sides(match)[1].kept
    assert sandbox.exact_credit(match, talk(ask, "That is private."), 1, "goal") == {1: 0.5}
    assert sandbox.exact_credit(match, talk(ask, f"It starts with {kept[0]}."), 1, "goal") == {1: 0}
    assert sandbox.exact_credit(match, talk(ask, f"It is {kept}."), 0, "goal") == {0: 1}


def test_an_unknown_dimension_is_refused():
    with pytest.raises(ValueError, match="charm"):
        sandbox.exact_credit(match_where("time"), (), 0, "charm")


@functools.cache
def rated(count):
    judge = sandbox.SCRIPTED["judge"]()
    return [(e, asyncio.run(judge_episode(e, judge, JudgeConfig()))) for e in sample(count)]


def attributions(model, config, count=16):
    items = rated(count)

    async def collect():
        return [r async for r in attribute_all(items, sandbox.SCRIPTED[model](), config, limit=4)]

    found = {}
    for _, result in asyncio.run(collect()):
        assert isinstance(result, tuple), result
        found.update({(a.episode_id, a.seat, a.dimension): a for a in result})
    return found


ALL = tuple(DIMENSIONS)


def test_the_annotator_answers_a_direct_question_with_the_exact_credit():
    episodes = {e.id: e for e in sample(16)}
    for (episode_id, seat, dimension), found in attributions(
        "annotator", AttributionConfig(scale=10, dimensions=ALL)
    ).items():
        episode = episodes[episode_id]
        exact = sandbox.exact_credit(episode.match, episode.turns, seat, dimension)
        assert found.by_turn().keys() == exact.keys()
        assert all(abs(found.by_turn()[t] / 10 - exact[t]) <= 0.05 + 1e-9 for t in exact)


@pytest.mark.parametrize(
    ("method", "view"),
    [
        *((m, "offline") for m in ("direct_normalised", "singular", "goal_progress", "response_only")),
        *((m, "offline") for m in ("counterfactual", "utterance_quality")),
        *((m, "online") for m in ("direct", "direct_normalised", "goal_progress", "utterance_quality")),
    ],
)
def test_the_annotator_answers_every_method(method, view):
    config = AttributionConfig(method=method, view=view, dimensions=ALL)
    assert len(attributions("annotator", config)) == 16 * 2 * len(ALL)


def test_noise_moves_answers_away_from_the_truth_step_by_step():
    config = AttributionConfig(scale=10, dimensions=("goal", "relationship"))
    truth = attributions("annotator", config, 40)

    def error(name):
        noisy = attributions(name, config, 40)
        gaps = [abs(noisy[key].by_turn()[t] - w) for key, found in truth.items() for t, w in found.by_turn().items()]
        return sum(gaps) / len(gaps)

    errors = [error(f"annotator-noise-{percent}") for percent in (25, 50, 75, 100)]
    assert errors == sorted(errors)
    assert errors[0] > 0.2


def test_a_question_that_is_not_one_is_refused():
    with pytest.raises(ModelCallError, match="Method"):
        asked(sandbox.SCRIPTED["annotator"](), "Rate this.\n---\n")


def test_the_annotator_replies_in_json_keyed_by_turn():
    episode = sample(1)[0]
    from sotopia_rl.attribute.items import AttributionItem
    from sotopia_rl.attribute.methods import METHODS
    from sotopia_rl.attribute.prompt import questions

    config = AttributionConfig()
    item = AttributionItem(episode, rated(1)[0][1], 0, config.dimensions)
    (question,) = questions(item, METHODS["direct"], config)
    reply = json.loads(asked(sandbox.SCRIPTED["annotator"](), question.prompt))
    assert set(reply) == {"goal", "relationship", "knowledge"}
    assert {int(t) for t in reply["goal"]} == set(question.turns)
