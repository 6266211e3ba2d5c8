"""The annotator's reply: exactly what was asked is read, anything else is refused in words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_rl.attribute.reply import parse_reply, reply_schema
from sotopia_rl.llm.structured import UnusableReply

RANGES = {"goal": (0, 3), "relationship": (-5, 5)}
TURNS = (0, 2, 4)
GOOD = {"goal": {"0": 3, "2": 0, "4": 1}, "relationship": {"0": -5, "2": 5, "4": 0}}


def changed(**goal: object) -> str:
    return json.dumps({**GOOD, "goal": {**GOOD["goal"], **{key.removeprefix("t"): v for key, v in goal.items()}}})


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=10, unique=True),
    st.data(),
)
def test_what_the_schema_describes_is_read_back(turns, data):
    answers = {name: {t: data.draw(st.integers(low, high)) for t in turns} for name, (low, high) in RANGES.items()}
    text = json.dumps({name: {str(t): n for t, n in numbers.items()} for name, numbers in answers.items()})
    assert parse_reply(text, RANGES, turns) == answers
    schema = reply_schema(RANGES, turns)
    assert schema["required"] == list(RANGES)
    assert schema["properties"]["goal"]["required"] == [str(t) for t in turns]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("```json\n", "\n```"),
        ("Here you are:\n", ""),
        ('<think>turn 0 is {"goal": 3}</think>', ""),
        ("", "\nI hope this helps."),
    ],
)
def test_wrapping_is_taken_off(before, after):
    assert parse_reply(before + json.dumps(GOOD) + after, RANGES, TURNS)["goal"] == {0: 3, 2: 0, 4: 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The goal was reached by turn 2.", "no JSON object"),
        ("", "empty"),
        ("null", "no JSON object"),
        ("{}", "missing dimension goal"),
        (json.dumps(GOOD)[:-9], "stops in the middle"),
        (json.dumps({"goal": GOOD["goal"]}), "missing dimension relationship"),
        (json.dumps({**GOOD, "summary": "fine"}), "unexpected dimension summary"),
        (json.dumps({**GOOD, "goal": None}), "goal: expected an object"),
        (json.dumps({**GOOD, "goal": [3, 0, 1]}), "goal: expected an object"),
        (changed(t0="2.5"), "turn 0: expected a whole number, found '2.5'"),
        (changed(t0="2"), "turn 0: expected a whole number, found '2'"),
        (changed(t0=None), "turn 0: expected a whole number, found None"),
        (changed(t0=1.5), "turn 0: expected a whole number, found 1.5"),
        (changed(t0=True), "turn 0: expected a whole number, found True"),
        (changed(t0=99), "turn 0: 99 is outside 0 to 3"),
        (changed(t0=-1), "turn 0: -1 is outside 0 to 3"),
        (changed(t1=1), "unexpected turn 1"),
        (json.dumps({**GOOD, "goal": {"0": 3, "2": 0}}), "missing turn 4"),
        (json.dumps({**GOOD, "goal": {"Utterance 0 by Ann": 3}}), "missing turn 0"),
        ('{"goal": {"0": 1, "0": 3, "2": 0, "4": 1}, "relationship": {"0": 0, "2": 0, "4": 0}}', "stands twice"),
    ],
)
def test_anything_else_is_refused_with_what_was_wrong(text, said):
    with pytest.raises(UnusableReply) as refusal:
        parse_reply(text, RANGES, TURNS)
    assert said in str(refusal.value)


def test_everything_wrong_is_said_at_once():
    text = json.dumps({"goal": {"0": "x", "2": 9}, "relationship": {"0": 0, "2": 0, "4": 0, "5": 0}})
    with pytest.raises(UnusableReply) as refusal:
        parse_reply(text, RANGES, TURNS)
    for said in ("goal: missing turn 4", "goal: turn 0", "goal: turn 2: 9", "relationship: unexpected turn 5"):
        assert said in str(refusal.value)


@given(st.text(max_size=200))
def test_no_text_is_read_as_something_or_crashes(text):
    with pytest.raises(UnusableReply):
        parse_reply(text, RANGES, TURNS)
