"""Rewards: bounded, comparable, and refused rather than guessed."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from attributed_episodes import PROVENANCE, answers, episode_of, rated_episodes, rating_of, weights_by
from sotopia_rl.attribute import AttributionConfig, attribute_all
from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS
from sotopia_rl.episode import Attribution, UtteranceWeight
from sotopia_rl.errors import DataError
from sotopia_rl.reward import Credited, Normaliser, RewardConfig, fit_normaliser, utterance_points, utterance_rewards
from sotopia_rl.reward_report import report_text, reward_report, write_reward_report

ALL_SEVEN = {d.name: 1.0 for d in SOTOPIA_DIMENSIONS}
GOAL = RewardConfig(weights={"goal": 1.0})
EPISODE = episode_of(["a", "b", "c", "d", None, "f"])


def credited(episode, rating, weight, dimensions=("goal", "relationship", "knowledge")) -> Credited:
    """Direct attribution with `weight(dimension, turn)`."""

    async def collect():
        config = AttributionConfig(dimensions=tuple(dimensions))
        results = attribute_all([(episode, rating)], weights_by(weight), config, limit=2)
        return [a async for _, outcome in results for a in answers(outcome)]

    return Credited(episode, rating, tuple(asyncio.run(collect())))


def attribution(seat, weights, *, episode=EPISODE, dimension="goal", top=3.0) -> Attribution:
    return Attribution(
        episode_id=episode.id,
        seat=seat,
        dimension=dimension,
        method="direct",
        annotator="test/annotator",
        weights=tuple(UtteranceWeight(turn=turn, weight=weight) for turn, weight in weights.items()),
        top_weight=top,
        provenance=PROVENANCE,
    )


def goal_of(*pairs) -> Credited:
    return Credited(EPISODE, rating_of(EPISODE), tuple(attribution(*pair) for pair in pairs))


# --- laws --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rated=st.lists(rated_episodes(min_turns=1), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_rewards_are_bounded_and_their_vectors_by_the_score(rated, seed):
    data = [credited(e, r, lambda name, turn: (turn * seed + len(name)) % 4, ALL_SEVEN) for e, r in rated]
    config = RewardConfig(weights=ALL_SEVEN)
    if not any(turn.action.action_type != "none" for e, _ in rated for turn in e.turns):
        return
    normaliser = fit_normaliser(data, config)
    for item in data:
        rewards = utterance_rewards(item, config, normaliser)
        spoken = [t.index for t in item.episode.turns if t.action.action_type != "none"]
        assert [r.turn for r in rewards] == spoken
        for reward in rewards:
            assert 0 <= reward.reward <= 10
            assert all(0 <= value <= 1 for value in reward.normalised.values())
            for name, points in reward.points.items():
                score = item.rating.points(reward.seat)[name]
                assert abs(points) <= abs(score)
                assert points * score >= 0


@settings(max_examples=40, deadline=None)
@given(rated=rated_episodes(min_turns=2), seed=st.integers(0, 99))
def test_a_greater_contribution_never_earns_less_when_the_score_is_good(rated, seed):
    episode, _ = rated
    rating = rating_of(episode, goal=9)
    item = credited(episode, rating, lambda _name, turn: (turn * seed) % 4, ("goal",))
    if not any(utterance_points(item, GOAL)):
        return
    rewards = {r.turn: r.reward for r in utterance_rewards(item, GOAL, fit_normaliser([item], GOAL))}
    for a in item.attributions:
        for one in a.weights:
            for other in a.weights:
                assert one.weight < other.weight or rewards[one.turn] >= rewards[other.turn]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(-20, 20))
def test_a_normaliser_read_back_normalises_the_same(values, later):
    normaliser = Normaliser(method="min_max", low={"x": min(values)}, high={"x": max(values)}, num_utterances=1)
    again = Normaliser.model_validate_json(normaliser.model_dump_json())
    assert again.normalise({"x": later}) == normaliser.normalise({"x": later})
    assert 0 <= again.normalise({"x": later})["x"] <= 1


# --- by hand -----------------------------------------------------------------------------------------------------


def test_rewards_by_hand():
    """Goal 8 with weights 0, 3; relationship -4 with weights 3, 1; weights 3:1."""
    rating = rating_of(EPISODE, goal=8, relationship=-4)
    item = Credited(
        EPISODE, rating, (attribution(0, {0: 0, 2: 3}), attribution(0, {0: 3, 2: 1}, dimension="relationship"))
    )
    config = RewardConfig(weights={"goal": 3.0, "relationship": 1.0})
    first, second = utterance_rewards(item, config, fit_normaliser([item], config))
    assert first.points == {"goal": 0.0, "relationship": -4.0}
    assert second.points == pytest.approx({"goal": 8.0, "relationship": -4 / 3})
    assert (first.reward, second.reward) == pytest.approx((0.0, 10.0))


def test_range_normalising_needs_no_data_and_keeps_no_effect_at_zero_points():
    config = RewardConfig(weights={"goal": 1.0, "relationship": 1.0, "secret": 1.0}, normalise="range")
    normaliser = fit_normaliser([], config)
    assert normaliser.normalise({"goal": 0, "relationship": 0, "secret": 0}) == {
        "goal": 0,
        "relationship": 0.5,
        "secret": 1,
    }


def test_a_dimension_with_one_value_says_so_and_moves_nothing(caplog):
    item = goal_of((0, {0: 3, 2: 3}))
    with caplog.at_level(logging.WARNING):
        normaliser = fit_normaliser([item], GOAL)
    assert normaliser.constant == ("goal",)
    assert "goal is 7 for all 2 utterances" in caplog.text
    assert {r.reward for r in utterance_rewards(item, GOAL, normaliser)} == {5.0}


def test_later_data_is_clipped_to_the_fitted_bounds():
    normaliser = Normaliser(method="min_max", low={"goal": 0.0}, high={"goal": 5.0}, num_utterances=3)
    rewards = utterance_rewards(goal_of((0, {0: 0, 2: 3})), GOAL, normaliser)
    assert [r.reward for r in rewards] == [0.0, 10.0]


def test_episode_granularity_gives_every_utterance_the_whole_score():
    rating = rating_of(EPISODE, goal=6)
    config = RewardConfig(weights={"goal": 1.0}, granularity="episode")
    points = utterance_points(Credited(EPISODE, rating), config)
    assert {p.turn.index: p.points["goal"] for p in points} == {0: 6, 1: 6, 2: 6, 3: 6, 5: 6}


def test_penalties_and_clipping():
    episode = episode_of(["one two three four five", None, "short"])
    rating = rating_of(episode, goal=10, secret=-4)
    item = Credited(episode, rating, (attribution(0, {0: 3, 2: 0}, episode=episode),))
    base = {"weights": {"goal": 1.0}}
    length = RewardConfig(**base, length_penalty=0.5, length_limit_words=3)
    assert [r.reward for r in utterance_rewards(item, length, fit_normaliser([item], length))] == [9.0, 0.0]
    secret = RewardConfig(**base, secret_penalty=1.0)
    assert [r.reward for r in utterance_rewards(item, secret, fit_normaliser([item], secret))] == [6.0, 0.0]
    clipped = RewardConfig(**base, clip_low=2, clip_high=8)
    assert [r.reward for r in utterance_rewards(item, clipped, fit_normaliser([item], clipped))] == [8.0, 2.0]
    told = attribution(0, {0: 0, 2: 3}, episode=episode, dimension="secret")
    blamed = Credited(episode, rating, (*item.attributions, told))
    assert [r.reward for r in utterance_rewards(blamed, secret, fit_normaliser([blamed], secret))] == [10.0, 0.0]


def test_a_dimension_without_a_judges_score_is_worth_what_the_config_says():
    item = Credited(EPISODE, rating_of(EPISODE), (attribution(0, {0: 3, 2: 1}, dimension="conversation_behaviour"),))
    config = RewardConfig(weights={"conversation_behaviour": 1.0})
    assert [p.points["conversation_behaviour"] for p in utterance_points(item, config)] == pytest.approx([10, 10 / 3])


def test_only_agents_with_attributions_are_rewarded():
    rewards = utterance_rewards(goal_of((0, {0: 1, 2: 3})), GOAL, fit_normaliser([goal_of((0, {0: 1, 2: 3}))], GOAL))
    assert {r.seat for r in rewards} == {0}


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (goal_of((0, {0: 1})), "weights for turns [0], the utterances are turns [0, 2]"),
        (goal_of((0, {0: 1, 2: 1, 4: 1})), "the utterances are turns [0, 2]"),
        (goal_of((0, {0: 99, 2: 1})), "weight 99 of turn 0 is outside 0 to 3"),
        (goal_of((0, {0: -1, 2: 1})), "weight -1 of turn 0 is outside"),
        (goal_of((0, {0: 1, 2: 1}), (0, {0: 2, 2: 2})), "two attributions"),
        (
            Credited(EPISODE, rating_of(EPISODE), (attribution(0, {0: 1, 2: 1}, dimension="secret"),)),
            "no attribution (episode",
        ),
        (Credited(EPISODE, rating_of(EPISODE, knowledge=1), (attribution(0, {0: 1, 2: 1}),)), "no score for 'goal'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_episode_named(item, said):
    with pytest.raises(DataError) as refusal:
        utterance_points(item, GOAL)
    assert said in str(refusal.value)
    assert EPISODE.id in str(refusal.value)


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match="no utterance"):
        fit_normaliser([], GOAL)


def test_a_normaliser_of_other_dimensions_is_refused():
    normaliser = Normaliser(method="min_max", low={"x": 0.0}, high={"x": 1.0}, num_utterances=1)
    with pytest.raises(ValueError, match="was not fitted on goal"):
        utterance_rewards(goal_of((0, {0: 1, 2: 1})), GOAL, normaliser)


@pytest.mark.parametrize(
    "settings",
    [{"weights": {}}, {"weights": {"goal": 0}}, {"clip_low": 5, "clip_high": 5}, {"length_penalty": -1}, {"clip": 1}],
)
def test_a_config_that_makes_no_sense_is_refused(settings):
    with pytest.raises(ValidationError):
        RewardConfig.model_validate(settings)


# --- report ------------------------------------------------------------------------------------------------------


def some_data() -> tuple[list[Credited], RewardConfig]:
    data = []
    for i in range(8):
        episode = episode_of([f"<b>{i}</b> & more", "y", "z"], key=i)
        rating = rating_of(episode, goal=i, relationship=i - 4, knowledge=3)
        data.append(credited(episode, rating, lambda name, turn: 3 if name == "knowledge" else turn + 1))
    return data, RewardConfig()


def test_the_report_counts_everything_and_names_extremes(caplog):
    data, config = some_data()
    report = reward_report(data, config, fit_normaliser(data, config), examples=2)
    assert (report.num_episodes, report.num_utterances, report.constant) == (8, 24, ("knowledge",))
    assert [sum(d.counts) for d in report.distributions] == [24] * 4
    assert report.correlations[0][0] == pytest.approx(1)
    assert report.correlations[2] == (None, None, None)
    rewards = [e.reward.reward for e in (*report.highest, *reversed(report.lowest))]
    assert rewards == sorted(rewards, reverse=True)
    text = report_text(report)
    assert "knowledge is constant" in text
    _, headings, *rows = text.partition("correlation of the points")[2].splitlines()[:5]
    assert headings.split() == ["1", "2", "3"]
    assert [row.split()[:2] for row in rows] == [["1", "goal"], ["2", "relationship"], ["3", "knowledge"]]
    assert [headings.index(number) for number in "123"] == [rows[0].index("1.00", 2) + 3 + 7 * n for n in range(3)]
    assert "24 utterances of 8 episodes" in text
    assert caplog.messages


def test_the_report_page_is_self_contained_and_escapes_utterances(tmp_path, caplog):
    data, config = some_data()
    (tmp_path / "normaliser.json").write_text(fit_normaliser(data, config).model_dump_json())
    text = write_reward_report(data, config, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "<b>" not in page
    assert "&lt;/b&gt; &amp; more" in page
    assert "://" not in page
    assert "highest rewards" in text
    assert caplog.messages


def test_a_report_of_nothing_is_refused():
    normaliser = fit_normaliser([], RewardConfig(normalise="range"))
    with pytest.raises(DataError, match="nothing to report"):
        reward_report([], RewardConfig(), normaliser)
