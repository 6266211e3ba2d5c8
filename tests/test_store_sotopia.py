from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_data import FOLDER, needs_sotopia_data, profiles
from sotopia_rl.episode import ACTION_TYPES, Rating, Score
from sotopia_rl.errors import DataError
from sotopia_rl.profiles import Profiles
from sotopia_rl.store.sotopia_read import LeftOutError, read_document
from sotopia_rl.store.sotopia_write import line_document, log_document
from store_samples import ANN, BEN, DIMENSIONS, FAILURE, episode, provenance, rating

KNOWN = Profiles({c.id: c for c in (ANN, BEN)}, {}, (), ())


def lines():
    path = FOLDER / "golden" / "episodes_to_jsonl_sotopia-0.1.4.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def golden_log():
    return json.loads((FOLDER / "golden" / "redis_EpisodeLog_sotopia-0.1.4.json").read_text(encoding="utf-8"))["value"]


def whole_profiles():
    return profiles()


def no_profiles():
    return Profiles({}, {}, (), ())


@needs_sotopia_data
@pytest.mark.parametrize("known", [whole_profiles, no_profiles])
def test_lines_that_sotopia_wrote_come_out_byte_for_byte_even_without_their_original(known):
    for text in lines():
        item = read_document(json.loads(text), where="golden", known=known())
        assert json.dumps(line_document(item.episode, item.rating, item.original)) == text
        assert json.dumps(line_document(item.episode, item.rating)) == text


@needs_sotopia_data
@pytest.mark.parametrize("known", [whole_profiles, no_profiles])
def test_the_log_that_sotopia_kept_in_redis_comes_out_unchanged(known):
    document = golden_log()
    item = read_document(document, where="golden", known=known())
    assert log_document(item.episode, item.rating, item.original) == document
    assert log_document(item.episode, item.rating) == document


@needs_sotopia_data
def test_what_the_profiles_know_is_taken_from_them():
    item = read_document(golden_log(), where="golden", known=profiles())
    scenario = profiles().scenarios[golden_log()["environment"]]
    assert item.notes == ()
    assert item.episode.match.scenario == scenario
    assert [c.id for c in item.episode.match.characters] == golden_log()["agents"]
    assert item.episode.match.characters[0].big_five != ""


@needs_sotopia_data
def test_without_profiles_the_contexts_say_what_prompts_are_made_of():
    item = read_document(golden_log(), where="golden")
    whole = read_document(golden_log(), where="golden", known=profiles()).episode.match
    found = item.episode.match
    assert "known only from" in " ".join(item.notes)
    assert found.scenario.goals == whole.scenario.goals
    assert found.scenario.relationship == whole.scenario.relationship
    for ours, theirs in zip(found.characters, whole.characters, strict=True):
        fields = ("id", "first_name", "last_name", "age", "gender", "gender_pronoun", "public_info", "secret")
        assert [getattr(ours, f) for f in fields] == [getattr(theirs, f) for f in fields]
        assert ours.occupation == theirs.occupation.lower()


@needs_sotopia_data
def test_the_judge_and_every_score_and_reason_are_read():
    item = read_document(golden_log(), where="golden")
    assert item.rating.judge == golden_log()["models"][0]
    for seat in (0, 1):
        assert (
            item.rating.points(seat) | {"overall_score": item.rating.overall(seat)} == golden_log()["rewards"][seat][1]
        )
        assert all(f"for agent {seat + 1}." in score.reason for score in item.rating.scores[seat].values())
    assert item.episode.end_reason == "left"


arguments = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
acted = st.one_of(
    st.tuples(st.sampled_from(["speak", "action", "non-verbal communication"]), arguments),
    st.tuples(st.sampled_from(["none", "leave"]), st.just("")),
    st.tuples(st.just("speak"), st.sampled_from(["did nothing", 'x"\n\ny said: "z"', "[action] x", "<b>&{a}</b>", ""])),
)


@given(actions=st.lists(acted, max_size=8), relationship=st.integers(0, 5))
def test_every_action_comes_back_exactly_from_a_log(actions, relationship):
    one = episode(actions=tuple(actions), relationship=relationship)
    assert {kind for kind, _ in actions} <= set(ACTION_TYPES)
    document = json.loads(json.dumps(log_document(one, rating(one))))
    back = read_document(document, where="here", known=KNOWN)
    assert [(t.seat, t.action) for t in back.episode.turns] == [(t.seat, t.action) for t in one.turns]
    assert back.rating.scores == rating(one).scores
    assert [len(group) for group in document["messages"]] == [4] * len(actions) + [2]
    assert log_document(back.episode, back.rating, back.original) == document


@given(reasons=st.lists(st.text(max_size=30), min_size=14, max_size=14))
def test_reasons_come_back_exactly_or_not_at_all(reasons):
    one = episode()
    seats = [
        {name: Score(score=1, reason=reasons[7 * seat + n]) for n, name in enumerate(DIMENSIONS)} for seat in (0, 1)
    ]
    given_rating = Rating(episode_id=one.id, judge="j", scores=(seats[0], seats[1]), provenance=provenance("j"))
    back = read_document(log_document(one, given_rating), where="here", known=KNOWN)
    for seat in (0, 1):
        assert back.rating.scores[seat] == given_rating.scores[seat]


def test_reasons_that_can_be_read_in_two_ways_are_not_read():
    one = episode()
    given_rating = rating(one)
    twisted = {**given_rating.scores[0], "believability": Score(score=1, reason="x\nsecret: told\ngoal: met")}
    given_rating = given_rating.model_copy(update={"scores": (twisted, given_rating.scores[1])})
    back = read_document(log_document(one, given_rating), where="here", known=KNOWN)
    assert {score.reason for score in back.rating.scores[0].values()} == {""}
    assert back.rating.points(0) == given_rating.points(0)
    assert back.rating.scores[1] == given_rating.scores[1]


def test_a_turn_of_the_unusual_agent_keeps_its_seat():
    document = log_document(episode(), rating(episode()))
    first, second = document["messages"][1][2:]
    document["messages"][1][2:] = [
        [first[0], "Environment", 'said: "me again"'],
        [second[0], "Environment", "did nothing"],
    ]
    back = read_document(document, where="here")
    assert (back.episode.turns[1].seat, back.episode.turns[1].action.argument) == (0, "me again")


def test_scores_of_a_judge_that_failed_are_no_rating():
    for rewards in ([0.0, 0.0], [None, None], [0.0, [1.0, {"goal": 1.0, "overall_score": 1.0}]]):
        document = {**log_document(episode(), rating(episode())), "rewards": rewards}
        item = read_document(document, where="here")
        assert item.rating is None
        assert "imported unjudged" in " ".join(item.notes)
        assert log_document(item.episode, None, item.original) == document
        with pytest.raises(LeftOutError, match="not judged"):
            line_document(item.episode, None, item.original)


def test_a_new_judge_and_a_new_tag_are_all_that_changes_in_an_original():
    document = log_document(episode(), rating(episode()))
    item = read_document(document, where="here")
    renamed = item.episode.model_copy(update={"tag": "new"})
    again = log_document(renamed, rating(renamed, "other", offset=1), item.original)
    changed = {key for key in document if document[key] != again[key]}
    assert changed == {"tag", "models", "rewards"}  # the reasons are the same
    assert again["models"][0] == "other"


def test_what_a_log_cannot_hold_is_left_out_and_not_written_as_something_else():
    with pytest.raises(LeftOutError, match=r"not completed \(agent_failed\)"):
        log_document(episode(failure=FAILURE), rating(episode()))
    with pytest.raises(LeftOutError, match="not judged"):
        log_document(episode(), None)
    text = json.dumps(log_document(episode(), rating(episode())))
    assert "sampling" not in text
    assert "sha256" not in text


@pytest.mark.parametrize(
    ("group", "cause"),
    [
        ([["Environment", "A", "x"]], "exactly one action"),
        (
            [["Environment", "A", ""], ["Environment", "B", ""], ["Ann", "Environment", "left"]],
            "a turn of an unknown speaker, 'Ann'",
        ),
    ],
)
def test_a_turn_that_is_none_is_left_out_with_its_cause(group, cause):
    document = log_document(episode(), rating(episode()))
    document["messages"][2] = group
    with pytest.raises(LeftOutError, match=cause):
        read_document(document, where="here")


def test_conversations_we_cannot_represent_are_left_out_with_their_cause():
    document = log_document(episode(), rating(episode()))
    document["messages"][0][3][2] = 'said: "both at once"'
    with pytest.raises(LeftOutError, match="both agents act in one turn"):
        read_document(document, where="here")
    document["messages"][0][3][2] = "hovers"
    with pytest.raises(LeftOutError, match="no known form"):
        read_document(document, where="here")
    with pytest.raises(LeftOutError, match="opening contexts"):
        read_document({**document, "messages": []}, where="here")


def test_what_is_no_episode_is_an_error_that_names_the_place():
    with pytest.raises(DataError, match=r"file\.jsonl:3: not an episode of sotopia's \(environment"):
        read_document({"pk": "x"}, where="file.jsonl:3")


def test_silent_turns_and_hidden_words_read_as_sotopia_renders_them():
    actions = (("speak", "Hi"), ("none", ""), ("speak", "I did nothing wrong"), ("action", "waves"))
    line = line_document(episode(actions=actions), rating(episode()))
    assert line["social_interactions"] == 'Élodie O\'Malley said: "Hi"\n\n\n\n\n\nBen Ito: [action] waves'
    quiet = line_document(episode(actions=(("none", ""), ("speak", "Hi"))), rating(episode()))
    assert quiet["social_interactions"] == 'Ben Ito said: "Hi"'
