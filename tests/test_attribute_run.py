"""Attribution end to end: the laws that hold for every method, every name and every text, and its failures."""

from __future__ import annotations

import asyncio
import json
import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from attributed_episodes import (
    AWKWARD,
    NAMES,
    Annotator,
    asked_of,
    episode_of,
    failing,
    rated_episodes,
    rating_of,
    weights_by,
)
from sotopia_rl.attribute import METHODS, AttributionConfig, AttributionItem, attribute_all, preview
from sotopia_rl.attribute.config import COMPUTED_METHODS, SCALED, MethodName
from sotopia_rl.attribute.prompt import questions
from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS, Dimension
from sotopia_rl.episode import Action, Attribution, Failure
from sotopia_rl.errors import BudgetError, ModelCallError
from sotopia_rl.observe import judge_view
from sotopia_rl.sandbox import exact_credit, matches

ALL_SEVEN = tuple(d.name for d in SOTOPIA_DIMENSIONS)
ASKING = sorted(set(METHODS) - COMPUTED_METHODS)
OFFLINE_WORLD_ONLY = {"exact"}
EVERYWHERE = sorted(set(METHODS) - OFFLINE_WORLD_ONLY)


def run(items, model, config, *, limit=4, **more):
    async def collect():
        return [pair async for pair in attribute_all(items, model, config, limit=limit, **more)]

    return asyncio.run(collect())


def attributions(results) -> list[Attribution]:
    found = []
    for _, outcome in results:
        assert not isinstance(outcome, Failure), outcome
        found += outcome
    return found


def by_place(results) -> dict[tuple[int, str], Attribution]:
    return {(a.seat, a.dimension): a for a in attributions(results)}


def answering(seed: int) -> Annotator:
    """Any answer that the rules allow, a function of the prompt's last lines only."""

    def reply(prompt: str, _call: int) -> str:
        dimensions, turns, top = asked_of(prompt)
        ranges = {}
        for line in prompt.splitlines():
            if line.startswith("Score range: "):
                name, low, _, high = line.removeprefix("Score range: ").split()
                ranges[name] = (int(low), int(high))
        numbers = {}
        for place, name in enumerate(dimensions):
            low, high = ranges.get(name, (0, top))
            drawn = {str(t): low + (seed * 31 + place * 7 + t * t) % (high - low + 1) for t in turns}
            if "\nMethod: singular" in prompt:
                drawn = {str(t): int(t == turns[seed % len(turns)]) for t in turns}
            if "\nMethod: direct_normalised" in prompt and not any(drawn.values()):
                drawn[str(turns[0])] = 1
            numbers[name] = drawn
        return json.dumps(numbers)

    return Annotator(reply)


# --- laws --------------------------------------------------------------------------------------------------------


def test_the_table_holds_every_method_that_the_config_names():
    assert set(METHODS) == set(get_args(MethodName))
    assert {name for name, method in METHODS.items() if method.asks is None} == COMPUTED_METHODS
    assert {name for name, m in METHODS.items() if m.asks == "weight"} - SCALED == {"singular"}


@pytest.mark.parametrize("method", EVERYWHERE)
@settings(max_examples=25, deadline=None)
@given(rated=rated_episodes(), seed=st.integers(0, 99), scale=st.sampled_from([3, 5, 10]), together=st.booleans())
def test_every_method_gives_one_weight_in_range_per_utterance(method, rated, seed, scale, together):
    episode, rating = rated
    config = AttributionConfig(method=method, scale=scale, together=together, dimensions=ALL_SEVEN)
    found = by_place(run([rated], answering(seed), config))
    assert set(found) == {(seat, name) for seat in (0, 1) for name in ALL_SEVEN}
    for (seat, name), attribution in found.items():
        spoken = [turn.index for turn in episode.utterances(seat)]
        assert [w.turn for w in attribution.weights] == spoken
        assert all(0 <= w.weight <= attribution.top_weight for w in attribution.weights)
        score = rating.points(seat)[name]
        for weight in attribution.weights:
            reward = weight.weight / attribution.top_weight * score
            assert abs(reward) <= abs(score)
            assert reward * score >= 0


@pytest.mark.parametrize("method", ["direct", "direct_normalised", "goal_progress", "utterance_quality"])
@settings(max_examples=25, deadline=None)
@given(rated=rated_episodes(), seed=st.integers(0, 99))
def test_the_online_view_never_shows_what_comes_later(method, rated, seed):
    episode, _ = rated
    model = answering(seed)
    found = by_place(run([rated], model, AttributionConfig(method=method, view="online")))
    assert sum(len(found[seat, "goal"].weights) for seat in (0, 1)) == len(model.prompts)
    for prompt in model.prompts:
        _, (turn,), _ = asked_of(prompt)
        shown = prompt.rpartition("\n\n---\n")[0]
        end = turn + 1 + METHODS[method].answered
        assert shown.endswith("\n\n" + judge_view(episode.match, episode.turns[:end], first_turn_number=0))
        assert "Scores of Agent" not in prompt


@settings(max_examples=40, deadline=None)
@given(rated=rated_episodes(), seed=st.integers(0, 99), samples=st.integers(1, 4))
def test_normalised_and_split_weights_sum_to_one(rated, seed, samples):
    for method in ("direct_normalised", "uniform_split", "singular"):
        config = AttributionConfig(method=method, samples=samples, temperature=1.0)
        for attribution in attributions(run([rated], answering(seed), config)):
            assert attribution.top_weight == 1
            if attribution.weights:
                assert math.isclose(math.fsum(w.weight for w in attribution.weights), 1)


@settings(max_examples=40, deadline=None)
@given(rated=rated_episodes(min_turns=1), names=st.sampled_from(NAMES), text=st.sampled_from(AWKWARD))
def test_neither_names_nor_texts_change_a_weight(rated, names, text):
    episode, _ = rated
    plain = [None if t.action.action_type == "none" else "Hello." for t in episode.turns]
    odd = [None if t is None else text for t in plain]

    def weight(name: str, turn: int) -> int:
        return (turn * 7 + len(name)) % 4

    results = []
    for spoken, people in ((plain, ("Ann One", "Bob Two")), (odd, names)):
        other = episode_of(spoken, names=people)
        found = by_place(run([(other, rating_of(other))], weights_by(weight), AttributionConfig()))
        results.append({place: a.by_turn() for place, a in found.items()})
    assert results[0] == results[1]
    for (_, name), weights in results[0].items():
        assert weights == {turn: weight(name, turn) for turn in weights}


@settings(max_examples=40, deadline=None)
@given(rated=rated_episodes(min_turns=1))
def test_the_annotator_sees_every_utterance_unchanged(rated):
    episode, _ = rated
    model = answering(0)
    run([rated], model, AttributionConfig())
    for prompt in model.prompts:
        for turn in episode.turns:
            assert f"Turn #{turn.index}" in prompt
            if turn.action.action_type in ("speak", "action", "non-verbal communication"):
                assert turn.action.argument in prompt


# --- the methods, by hand ----------------------------------------------------------------------------------------

FOUR = episode_of(["a", "b", "c", "d", "e", "f", "g", "h"], key="four")


def weights(method: str, answers: dict[int, int], *, score: float = 8, **more) -> dict[int, float]:
    """Weights of seat 0 of `FOUR` (turns 0, 2, 4, 6) on goal."""
    config = AttributionConfig(method=method, dimensions=("goal",), **more)
    model = weights_by(lambda _name, turn: answers.get(turn, int(turn == 1)))
    found = by_place(run([(FOUR, rating_of(FOUR, goal=score))], model, config))
    return {turn: w / found[0, "goal"].top_weight for turn, w in found[0, "goal"].by_turn().items()}


def test_direct_is_the_answer_over_the_scale():
    assert weights("direct", {0: 0, 2: 3, 4: 1, 6: 2}) == pytest.approx({0: 0, 2: 1, 4: 1 / 3, 6: 2 / 3})
    assert weights("direct", {0: 0, 2: 3, 4: 1, 6: 10}, scale=10) == pytest.approx({0: 0, 2: 0.3, 4: 0.1, 6: 1})


def test_normalised_is_the_share():
    assert weights("direct_normalised", {0: 0, 2: 3, 4: 1, 6: 0}) == pytest.approx({0: 0, 2: 0.75, 4: 0.25, 6: 0})


def test_singular_is_one_utterance():
    assert weights("singular", {0: 0, 2: 1, 4: 0, 6: 0}) == {0: 0, 2: 1, 4: 0, 6: 0}


def test_scaled_is_discounted_from_the_last_utterance_on():
    assert weights("scaled", {}, discount=0.5) == {0: 0.125, 2: 0.25, 4: 0.5, 6: 1}


def test_uniform_has_two_definitions():
    assert weights("uniform", {}) == {0: 1, 2: 1, 4: 1, 6: 1}
    assert weights("uniform_split", {}) == {0: 0.25, 2: 0.25, 4: 0.25, 6: 0.25}


def test_goal_progress_pays_the_points_gained():
    """Standings 2, 6, 5, 8 of a score of 8: gains 2, 4, none, 3."""
    assert weights("goal_progress", {0: 2, 2: 6, 4: 5, 6: 8}) == {0: 2 / 8, 2: 4 / 8, 4: 0, 6: 3 / 8}


def test_counterfactual_pays_what_would_be_missing():
    assert weights("counterfactual", {0: 8, 2: 1, 4: 5, 6: 10}) == {0: 0, 2: 7 / 8, 4: 3 / 8, 6: 0}


def test_with_a_negative_score_the_harm_is_weighed():
    config = AttributionConfig(method="goal_progress", dimensions=("relationship",))
    model = weights_by(lambda _name, turn: {0: 1, 2: -3, 4: -3, 6: -4}.get(turn, 0))
    found = by_place(run([(FOUR, rating_of(FOUR, relationship=-4))], model, config))
    assert found[0, "relationship"].by_turn() == {0: 0, 2: 4, 4: 0, 6: 1}
    assert found[0, "relationship"].top_weight == 4


def test_a_score_of_zero_leaves_nothing_to_weigh():
    assert weights("counterfactual", {0: 8, 2: 1, 4: 5, 6: 10}, score=0) == {0: 0, 2: 0, 4: 0, 6: 0}


def test_several_samples_are_averaged_and_their_spread_is_kept():
    model = Annotator(lambda prompt, call: json.dumps({"goal": {str(t): call % 2 * 2 for t in asked_of(prompt)[1]}}))
    config = AttributionConfig(dimensions=("goal",), samples=4, temperature=0.7)
    for attribution in attributions(run([(FOUR, rating_of(FOUR))], model, config, limit=1)):
        assert {w.weight for w in attribution.weights} == {1.0}
        assert {w.spread for w in attribution.weights} == {1.0}
    assert len(set(model.seeds)) == len(model.seeds) == 8


def test_one_sample_has_no_spread():
    found = attributions(run([(FOUR, rating_of(FOUR))], weights_by(lambda _n, _t: 1), AttributionConfig()))
    assert {w.spread for a in found for w in a.weights} == {None}


def test_exact_is_the_sandboxs_credit_and_fails_elsewhere():
    match = matches("train", 1)[0]
    item = FOUR.model_copy(update={"match": match})
    config = AttributionConfig(method="exact", dimensions=("goal",))
    found = by_place(run([(item, rating_of(item))], None, config))
    assert found[0, "goal"].by_turn() == exact_credit(match, item.turns, 0, "goal")
    assert found[0, "goal"].top_weight == 1
    for _, outcome in run([(FOUR, rating_of(FOUR))], None, config):
        assert isinstance(outcome, Failure)
        assert outcome.kind == "bad_input"


# --- custom dimensions, several dimensions -----------------------------------------------------------------------


def test_conversation_behaviour_and_custom_dimensions_are_attributed():
    humour = Dimension(name="humour", low=0, high=5, description="The agent is funny.")
    config = AttributionConfig(dimensions=("conversation_behaviour", "humour"), custom_dimensions=(humour,))
    model = weights_by(lambda name, _turn: 3 if name == "humour" else 1)
    found = by_place(run([(FOUR, rating_of(FOUR))], model, config))
    assert found[0, "humour"].by_turn() == {0: 3, 2: 3, 4: 3, 6: 3}
    assert "- humour (0 to 5): The agent is funny." in model.prompts[0]
    assert "- humour: " not in model.prompts[0]


def test_a_method_that_needs_a_score_fails_where_there_is_none():
    config = AttributionConfig(method="counterfactual", dimensions=("conversation_behaviour",))
    for _, outcome in run([(FOUR, rating_of(FOUR))], weights_by(lambda _n, _t: 0), config):
        assert isinstance(outcome, Failure)
        assert outcome.kind == "bad_input"
        assert "conversation_behaviour" in outcome.message


def test_usage_of_a_shared_question_is_counted_once():
    model = weights_by(lambda _n, _t: 1)
    found = attributions(run([(FOUR, rating_of(FOUR))], model, AttributionConfig()))
    assert sum(a.provenance.usage.calls for a in found) == len(model.prompts) == 2
    assert sum(a.provenance.usage.prompt_tokens for a in found) == sum(len(p) // 4 for p in model.prompts)


def test_one_call_for_three_dimensions_takes_at_most_half_the_tokens_of_three_calls():
    """On made-up episodes of SOTOPIA's size; `test_attribute_golden.py` measures the real ones."""
    episode = episode_of(
        [f"This is utterance number {i}, of about twenty words, as people say them. " * 2 for i in range(20)]
    )
    tokens = []
    for together in (True, False):
        model = weights_by(lambda _n, _t: 1)
        found = attributions(run([(episode, rating_of(episode))], model, AttributionConfig(together=together)))
        tokens.append(sum(a.provenance.usage.prompt_tokens + a.provenance.usage.completion_tokens for a in found))
    assert tokens[0] <= 0.5 * tokens[1]


# --- failures ----------------------------------------------------------------------------------------------------

BAD_REPLIES = [
    "I think turn 2 was decisive.",
    "```json\n{}\n```",
    "null",
    '{"goal": {"0": "2.5", "2": 0, "4": 0, "6": 0}}',
    '{"goal": {"0": null, "2": 0, "4": 0, "6": 0}}',
    '{"goal": {"0": 99, "2": 0, "4": 0, "6": 0}}',
    '{"goal": {"0": 3, "2": 0, "4": 0}}',
    '{"goal": {"0": 3, "2": 0, "4": 0, "6": 0, "8": 1}}',
    '{"goal": {"Utterance 0 by Finnegan O\'Malley": 3}}',
    '{"goal": {"0": 3, "2": 0, "4"',
]


@pytest.mark.parametrize("bad", BAD_REPLIES)
def test_a_bad_reply_is_asked_again_with_what_was_wrong(bad):
    good = json.dumps({"goal": {"0": 3, "2": 0, "4": 0, "6": 0}})
    model = Annotator(lambda _prompt, call: bad if call == 0 else good)
    episode = episode_of(["a", None, "c", None, "e", None, "g", None])
    config = AttributionConfig(dimensions=("goal",))
    found = by_place(run([(episode, rating_of(episode))], model, config))
    attribution, silent = found[0, "goal"], found[1, "goal"]
    assert attribution.by_turn() == {0: 3, 2: 0, 4: 0, 6: 0}
    assert attribution.provenance.attempts == 2
    assert attribution.provenance.usage.calls == 2
    assert silent.weights == ()
    assert bad in model.conversations[1]
    assert "cannot be used: " in model.conversations[1][-1]


@pytest.mark.parametrize("bad", BAD_REPLIES)
def test_a_reply_that_stays_bad_fails_alone_and_is_never_zeros(bad):
    others = [(e, rating_of(e)) for e in (episode_of(["x", "y"], key=i) for i in range(5))]

    def reply(prompt: str, _call: int) -> str:
        dimensions, turns, _ = asked_of(prompt)
        return bad if len(turns) == 4 else json.dumps({n: {str(t): 1 for t in turns} for n in dimensions})

    config = AttributionConfig(dimensions=("goal",), max_attempts=2)
    results = run([*others[:2], (FOUR, rating_of(FOUR)), *others[2:]], Annotator(reply), config)
    failed = [outcome for item, outcome in results if item.episode.id == FOUR.id]
    fine = [outcome for item, outcome in results if item.episode.id != FOUR.id]
    assert all(isinstance(outcome, Failure) and outcome.kind == "bad_reply" for outcome in failed)
    assert len(failed) == 2
    assert len(fine) == 10
    assert not any(isinstance(outcome, Failure) for outcome in fine)


def test_with_one_call_per_dimension_one_can_fail_without_the_others():
    def reply(prompt: str, _call: int) -> str:
        (name,), turns, _ = asked_of(prompt)
        return "sorry" if name == "knowledge" else json.dumps({name: {str(t): 1 for t in turns}})

    results = run([(FOUR, rating_of(FOUR))], Annotator(reply), AttributionConfig(together=False))
    failed = {(item.seat, item.dimensions) for item, outcome in results if isinstance(outcome, Failure)}
    assert failed == {(0, ("knowledge",)), (1, ("knowledge",))}
    assert len(results) == 6


@pytest.mark.parametrize(("method", "bad"), [("singular", 1), ("singular", 0), ("direct_normalised", 0)])
def test_a_rule_of_the_method_is_enforced(method, bad):
    """Two key utterances or none; nothing at all to share out."""
    model = weights_by(lambda _n, _t: bad)
    results = run([(FOUR, rating_of(FOUR))], model, AttributionConfig(method=method, max_attempts=2))
    assert all(isinstance(outcome, Failure) for _, outcome in results)
    assert len(model.prompts) == 4


def test_a_call_that_fails_is_a_failure_of_its_item():
    error = ModelCallError("503 from the server", model="test/annotator", kind="http_5xx")
    results = run([(FOUR, rating_of(FOUR))], failing(error), AttributionConfig())
    assert [outcome.kind for _, outcome in results] == ["http_5xx", "http_5xx"]


def test_a_spent_budget_stops_asking():
    items = [(e, rating_of(e)) for e in (episode_of(["x", "y"], key=i) for i in range(50))]
    model = failing(BudgetError("spend cap of $1 reached", model="test/annotator"))
    results = run(items, model, AttributionConfig(), limit=2)
    assert len(results) == 2


def test_a_rating_of_another_episode_is_a_bug_of_the_caller():
    other = episode_of(["x"], key="other")
    with pytest.raises(ValueError, match="came with episode"):
        run([(FOUR, rating_of(other))], weights_by(lambda _n, _t: 1), AttributionConfig())


def test_a_method_that_asks_needs_a_model():
    with pytest.raises(ValueError, match="give a model"):
        run([(FOUR, rating_of(FOUR))], None, AttributionConfig())
    assert len(run([(FOUR, rating_of(FOUR))], None, AttributionConfig(method="uniform"))) == 2


def test_an_agent_that_is_silent_throughout_is_asked_about_by_nobody():
    episode = episode_of(["x", None, "z", None])
    model = weights_by(lambda _n, _t: 1)
    found = by_place(run([(episode, rating_of(episode))], model, AttributionConfig()))
    assert len(model.prompts) == 1
    assert found[1, "goal"].weights == ()
    assert found[1, "goal"].provenance.model == "computed"


# --- resuming ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(rated=st.lists(rated_episodes(), min_size=1, max_size=4, unique_by=lambda r: r[0].id), data=st.data())
def test_a_resumed_run_ends_with_the_records_of_an_unbroken_one(rated, data):
    config = AttributionConfig(samples=2, temperature=1.0, together=data.draw(st.booleans()))
    whole = run(rated, answering(1), config)
    written: dict[tuple, Attribution] = {}
    every = [a for _, outcome in whole for a in outcome]
    for attribution in data.draw(st.lists(st.sampled_from(every), max_size=len(every))):
        written[attribution.episode_id, attribution.seat, attribution.dimension] = attribution
    model = answering(1)
    rest = run(rated, model, config, done=lambda key: key[:3] in written)
    written |= {(a.episode_id, a.seat, a.dimension): a for _, outcome in rest for a in outcome}
    assert written == {(a.episode_id, a.seat, a.dimension): a for a in every}
    if len(rest) == 0:
        assert model.prompts == []


def test_episodes_are_taken_only_as_there_is_room():
    taken = []

    def endless():
        for i in range(10_000):
            taken.append(i)
            episode = episode_of(["x", "y"], key=i)
            yield episode, rating_of(episode)

    async def first():
        results = attribute_all(endless(), weights_by(lambda _n, _t: 1), AttributionConfig(), limit=4)
        async for _ in results:
            break
        await results.aclose()

    asyncio.run(first())
    assert len(taken) <= 4


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ASKING)
def test_every_prompt_names_what_is_rated_on_lines_of_their_own(method):
    episode = episode_of([Action(action_type="action", argument="waves"), "b", None, "d", "e"])
    item = AttributionItem(episode, rating_of(episode), 0, ("goal", "relationship"))
    (question,) = questions(item, METHODS[method], AttributionConfig(method=method))
    lines = question.prompt.splitlines()
    assert lines[lines.index("Rated agent: 1") - 1] == f"Method: {method}"
    assert lines[lines.index("Rated agent: 1") + 1] == "Rated turns: 0, 4"
    assert lines[lines.index("Rated agent: 1") + 2] == "Rated dimensions: goal, relationship"
    assert question.turns == (0, 4)
    assert "\n\n\n" not in question.prompt
    assert json.loads(lines[-1]).keys() == {"goal", "relationship"}


def test_the_direct_prompt_holds_the_judges_view_and_the_scale():
    item = AttributionItem(FOUR, rating_of(FOUR), 1, ("goal",))
    (question,) = questions(item, METHODS["direct"], AttributionConfig(scale=5))
    for text in ("Method: direct-5", "Top weight: 5", "Rated agent: 2", "a secret", "- goal: 7", "Buy it. (cheaply)"):
        assert text in question.prompt
    hidden = questions(item, METHODS["direct"], AttributionConfig(show_scores=False))[0].prompt
    assert "Scores of Agent" not in hidden


def test_response_only_hides_the_rest_of_the_conversation():
    episode = episode_of(["first", "answer", "middle", None, "last"])
    item = AttributionItem(episode, rating_of(episode), 0, ("goal",))
    (question,) = questions(item, METHODS["response_only"], AttributionConfig(method="response_only"))
    for text in ('said: "first"', 'said: "answer"', "did nothing", "(none, it was the last)", "Sell the bike."):
        assert text in question.prompt
    assert "a secret" not in question.prompt
    assert "Scores of Agent" not in question.prompt


# --- config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dimensions": ("gaol",)}, "unknown dimension gaol"),
        ({"dimensions": ()}, "at least 1"),
        ({"dimensions": ("goal", "goal")}, "named twice"),
        ({"samples": 3}, "at temperature 0"),
        ({"method": "singular", "view": "online"}, "no online view"),
        ({"method": "uniform", "view": "online"}, "no online view"),
        ({"method": "counterfactual", "view": "online"}, "no online view"),
        ({"scale": 4}, "3, 5 or 10"),
        ({"method": "best"}, "direct_normalised"),
        ({"custom_dimensions": ({"name": "goal", "low": 0, "high": 3, "description": "x"},)}, "built-in"),
        ({"scales": 3}, "Extra inputs"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, said):
    with pytest.raises(ValidationError) as refusal:
        AttributionConfig.model_validate(settings)
    assert said in str(refusal.value)


def test_the_label_tells_apart_what_a_weight_means():
    labels = [
        AttributionConfig().label,
        AttributionConfig(scale=10).label,
        AttributionConfig(view="online").label,
        AttributionConfig(scale=5, view="online").label,
        AttributionConfig(method="uniform", scale=5).label,
        AttributionConfig(method="scaled", discount=0.5).label,
    ]
    assert labels == ["direct", "direct-10", "direct-online", "direct-5-online", "uniform", "scaled-0.5"]


# --- dry run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"together": False}, {"view": "online"}, {"samples": 3, "temperature": 1.0}])
def test_a_preview_counts_the_calls_and_tokens_of_the_run(more):
    items = [(e, rating_of(e)) for e in (episode_of(["x", "y", "z"], key=i) for i in range(3))]
    config = AttributionConfig(**more)
    model = weights_by(lambda _n, _t: 1)
    found = attributions(run(items, model, config))
    seen = preview(items, config, "openai/gpt-4o")
    assert seen.calls == len(model.prompts)
    assert seen.prompt in model.prompts
    assert seen.prompt_tokens == pytest.approx(sum(a.provenance.usage.prompt_tokens for a in found), rel=0.01)
    assert seen.completion_tokens == pytest.approx(sum(a.provenance.usage.completion_tokens for a in found), rel=0.2)
    assert seen.cost_usd > 0
    assert f"{seen.calls} calls" in str(seen)


def test_a_preview_leaves_out_what_is_done_and_says_when_a_price_is_unknown():
    items = [(FOUR, rating_of(FOUR))]
    assert preview(items, AttributionConfig(), "custom/x@http://localhost:1/v1").cost_usd is None
    assert preview(items, AttributionConfig(), "x", prices={"x": (1.0, 1.0)}).cost_usd > 0
    nothing = preview(items, AttributionConfig(), "x", done=lambda _key: True)
    assert (nothing.calls, nothing.items, nothing.prompt, nothing.cost_usd) == (0, 0, "", 0.0)
    assert preview(items, AttributionConfig(method="uniform"), "computed").calls == 0
