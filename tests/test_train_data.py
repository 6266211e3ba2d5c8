import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_rl.dataset import PromptRow
from sotopia_rl.episode import ACTION_TYPES, Action, Turn
from sotopia_rl.errors import DataError
from sotopia_rl.models import Message
from sotopia_rl.observe import agent_prompt
from sotopia_rl.train.data import encode_rows, history_cuts, length_report, reply_text, shortened, split_by_episode
from training_rows import reward_rows, talk_match

TRICKY = st.sampled_from(["\nTurn #0: ", "\nTurn #1: Ann Lee ", "\n\nTurn #2: ", "You are at Turn #3", "\n", '"', "Hi"])
ARGUMENTS = st.lists(TRICKY | st.text(max_size=8), max_size=4).map("".join)
ACTIONS = st.builds(Action, action_type=st.sampled_from(ACTION_TYPES), argument=ARGUMENTS)
PROFILES = st.sampled_from(["compact", "default", "paper", "sotopia-0.1.5"])


class Letters:
    """A tokenizer whose tokens are characters, with a bare chat template."""

    eos_token_id = 0

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) + 1 for letter in text]}

    def apply_chat_template(self, conversations: Any, **options: Any) -> dict[str, list[list[int]]]:
        texts = ["".join(message["content"] for message in one) + "\n" for one in conversations]
        return {"input_ids": [self(text, add_special_tokens=False)["input_ids"] for text in texts]}


def row_at(actions: list[Action], profile: str) -> tuple[PromptRow, list[str]]:
    """A row after these actions, and its prompt after dropping 0, 1, ... of the oldest turns."""
    match, _ = talk_match(random.Random(0), 0)
    turns = [Turn(index=i, seat=0 if i % 2 == 0 else 1, action=action) for i, action in enumerate(actions)]
    seat = 0 if len(turns) % 2 == 0 else 1
    text = agent_prompt(match, turns, seat, profile=profile)
    row = PromptRow(
        prompt=(Message(role="user", content=text),), episode_id="E", scenario_id="S", turn=len(turns), seat=seat
    )
    empty = agent_prompt(match, [], seat, profile=profile)
    opening_end = empty.rfind("You are at Turn #0")
    tail = text[text.rfind(f"You are at Turn #{len(turns)}") :]
    opening = empty[: empty.find("Conversation Starts:\n") + len("Conversation Starts:\n")]
    assert opening_end > 0
    assert text.startswith(opening)
    return row, [opening, tail]


@given(st.lists(ACTIONS, min_size=1, max_size=6), PROFILES)
def test_cutting_history_never_leaves_a_fragment_of_a_turn(actions: list[Action], profile: str) -> None:
    row, (opening, tail) = row_at(actions, profile)
    text = row.prompt[-1].content
    match, _ = talk_match(random.Random(0), 0)
    names = [c.name for c in match.characters]
    whole_suffixes = set()
    cuts = [0, *history_cuts(text, row.turn)]
    for place in range(len(cuts)):
        whole_suffixes.add(shortened(row.prompt, cuts, place)[-1].content)
    turns = [Turn(index=i, seat=0 if i % 2 == 0 else 1, action=action) for i, action in enumerate(actions)]
    from sotopia_rl.observe import observation_text

    observed = [observation_text(turn, names[turn.seat]) for turn in turns]
    for prompt in whole_suffixes:
        assert prompt.startswith(opening)
        assert prompt.endswith(tail)
        middle = prompt[len(opening) : len(prompt) - len(tail)]
        kept = ["\n" + "\n".join(observed[k:]) for k in range(len(observed))]
        assert middle.strip("\n.") == "" or any(middle.startswith(turns_text) for turns_text in kept)


def test_a_long_prompt_loses_its_oldest_turns_and_nothing_else() -> None:
    row = reward_rows(1, turns=6)[-1]
    (whole,) = encode_rows(Letters(), [row], max_length=100_000, reply=reply_text)
    (cut,) = encode_rows(Letters(), [row], max_length=len(whole.ids) - 1, reply=reply_text)
    assert whole.dropped_turns == 0
    assert cut.dropped_turns == 1
    assert len(cut.ids) < len(whole.ids)
    assert cut.completion_ids == whole.completion_ids
    text = cut.messages[-1].content
    assert "Turn #0: " not in text
    assert "Turn #1: " in text
    assert "'s goal: " in text
    assert text.endswith("You are at Turn #5.")
    assert text.startswith("You are ")
    assert length_report([whole, cut])["shortened_rows"] == 1


@given(st.integers(0, 60))
def test_as_much_history_stays_as_fits(less: int) -> None:
    row = reward_rows(1, turns=6)[-1]
    (whole,) = encode_rows(Letters(), [row], max_length=100_000)
    (cut,) = encode_rows(Letters(), [row], max_length=len(whole.ids) - less)
    assert len(cut.ids) <= len(whole.ids) - less
    cuts = [0, *history_cuts(row.prompt[-1].content, row.turn)]
    lengths = [len(shortened(row.prompt, cuts, k)[-1].content) + 1 for k in range(len(cuts))]
    assert len(cut.ids) == max(length for length in lengths if length <= len(whole.ids) - less)


def test_a_row_that_cannot_fit_is_refused_by_name_and_none_is_dropped() -> None:
    rows = reward_rows(3)
    with pytest.raises(DataError, match=r"12 of 12 rows do not fit into 100 tokens .* episode e0, turn 0, with \d+"):
        encode_rows(Letters(), rows, max_length=100, reply=reply_text)


@given(st.integers(1, 20), st.floats(0, 0.9), st.integers(0, 5))
def test_no_episode_stands_on_both_sides(episodes: int, share: float, seed: int) -> None:
    rows = [(f"e{i % episodes}", i) for i in range(60)]
    training, held_out = split_by_episode(rows, lambda row: row[0], share, seed)
    assert sorted(training + held_out, key=lambda row: row[1]) == rows
    assert not {e for e, _ in training} & {e for e, _ in held_out}
    assert training
    assert bool(held_out) == (share > 0 and episodes > 1)
    assert split_by_episode(rows, lambda row: row[0], share, seed) == (training, held_out)
