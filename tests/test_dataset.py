"""Training rows: the prompt that was sent, the action that was taken, and no leak between the splits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attributed_episodes import episode_of, episodes, rating_of
from sotopia_rl.dataset import (
    CloningFilter,
    Judged,
    PromptRow,
    RewardRow,
    SFTRow,
    SplitConfig,
    check_leaks,
    prompt_rows,
    read_rows,
    reward_rows,
    select_for_cloning,
    sft_rows,
    side_of,
    split_rows,
    write_paper_rows,
    write_rows,
)
from sotopia_rl.episode import Action, UtteranceReward
from sotopia_rl.errors import DataError
from sotopia_rl.observe import PROFILES, agent_prompt

EPISODE = episode_of(["a", "b", None, Action(action_type="leave")])


def reward_of(episode, turn, *, seat=None, value=5.0) -> UtteranceReward:
    return UtteranceReward(
        episode_id=episode.id,
        turn=turn,
        seat=turn % 2 if seat is None else seat,
        points={"goal": 1.0},
        normalised={"goal": 0.5},
        reward=value,
    )


def row(episode_id: str, scenario_id: str = "s") -> PromptRow:
    prompt = ({"role": "user", "content": "x"},)
    return PromptRow.model_validate(
        {"prompt": prompt, "episode_id": episode_id, "scenario_id": scenario_id, "turn": 0, "seat": 0}
    )


# --- what a row says ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(episode=episodes(), profile=st.sampled_from([None, *PROFILES]))
def test_a_row_is_the_prompt_of_its_turn_and_the_action_taken(episode, profile):
    rows = list(sft_rows(episode, profile=profile))
    assert [r.turn for r in rows] == [t.index for t in episode.turns if t.action.action_type != "none"]
    for r in rows:
        turn = episode.turns[r.turn]
        (prompt,), (completion,) = r.prompt, r.completion
        before = episode.turns[: r.turn]
        assert prompt.content == agent_prompt(
            episode.match, before, turn.seat, profile=profile or episode.prompt_profile
        )
        assert (prompt.role, completion.role) == ("user", "assistant")
        assert Action.model_validate_json(completion.content) == turn.action
        assert (r.episode_id, r.scenario_id, r.seat) == (episode.id, "s1", turn.seat)


@settings(max_examples=60, deadline=None)
@given(episode=episodes(), value=st.floats(0, 10))
def test_rows_read_back_are_the_rows_written(episode, value, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    spoken = [t for t in episode.turns if t.action.action_type != "none"]
    rows = list(reward_rows(episode, [reward_of(episode, t.index, value=value) for t in spoken]))
    assert write_rows(rows, path) == len(rows) == len(spoken)
    if rows:
        assert list(read_rows(RewardRow, path)) == rows
        assert [r.prompt for r in read_rows(PromptRow, path)] == [r.prompt for r in rows]
        assert len(path.read_text(encoding="utf-8").split("\n")) == len(rows) + 1


def test_rows_are_in_trls_prompt_completion_form():
    (first, *_) = sft_rows(EPISODE)
    data = json.loads(first.model_dump_json())
    assert [message["role"] for message in data["prompt"]] == ["user"]
    assert data["completion"] == [{"role": "assistant", "content": '{"action_type": "speak", "argument": "a"}'}]


def test_the_action_text_holds_no_tag_of_the_transcript():
    """The paper's code trained on arguments that began with `[action] `."""
    waving = episode_of([Action(action_type="action", argument="waves")])
    (only,) = sft_rows(waving)
    assert only.completion[0].content == '{"action_type": "action", "argument": "waves"}'


def test_rows_can_be_of_one_seat():
    assert [r.turn for r in sft_rows(EPISODE, (1,))] == [1, 3]
    assert [type(r) for r in prompt_rows(EPISODE, (0,))] == [PromptRow]


def test_only_rewarded_utterances_have_reward_rows():
    rows = list(reward_rows(EPISODE, [reward_of(EPISODE, 3), reward_of(EPISODE, 0, value=2.5)]))
    assert [(r.turn, r.value, r.values) for r in rows] == [(0, 2.5, {"goal": 0.5}), (3, 5.0, {"goal": 0.5})]


@pytest.mark.parametrize("wrong", [reward_of(EPISODE, 2), reward_of(EPISODE, 9), reward_of(EPISODE, 0, seat=1)])
def test_a_reward_that_fits_no_utterance_is_refused(wrong):
    with pytest.raises(DataError, match="fits no utterance"):
        list(reward_rows(EPISODE, [wrong]))


# --- files -------------------------------------------------------------------------------------------------------


def test_the_papers_arrays_hold_input_output_and_value(tmp_path):
    rewarded = list(reward_rows(EPISODE, [reward_of(EPISODE, 0)]))
    assert write_paper_rows(rewarded, tmp_path / "reward.json") == 1
    (item,) = json.loads((tmp_path / "reward.json").read_text())
    assert item == {
        "input": agent_prompt(EPISODE.match, (), 0),
        "output": '{"action_type": "speak", "argument": "a"}',
        "value": 5.0,
    }
    write_paper_rows(sft_rows(EPISODE), tmp_path / "sft.json")
    assert [set(i) for i in json.loads((tmp_path / "sft.json").read_text())] == [{"input", "output"}] * 3
    assert write_paper_rows([], tmp_path / "none.json") == 0
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows([row("a")], path)

    def rows():
        yield row("b")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rows(rows(), path)
    assert [r.episode_id for r in read_rows(PromptRow, path)] == ["a"]


GOOD_LINE = next(reward_rows(EPISODE, [reward_of(EPISODE, 0)])).model_dump_json()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (GOOD_LINE[:-20], "not JSON"),
        ("nonsense", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"prompt": []}', "rows.jsonl:2: field prompt"),
        (GOOD_LINE.replace('"value":5.0', '"value":NaN'), "field value: Input should be a finite number"),
        (GOOD_LINE.replace('"value":5.0', '"value":11'), "field value: Input should be less than or equal to 10"),
        (GOOD_LINE.replace('"value":5.0', '"value":"high"'), "field value"),
        (GOOD_LINE.replace('"value":5.0,', ""), "field value: Field required"),
        (GOOD_LINE.replace('{"goal":0.5}', '{"goal":Infinity}'), "not a finite number: goal"),
        (GOOD_LINE.replace('"episode_id"', '"episode"'), "episode"),
        (GOOD_LINE.replace('"seat":0', '"seat":2'), "field seat"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD_LINE}\n{line}\n{GOOD_LINE}\n")
    with pytest.raises(DataError) as refusal:
        list(read_rows(RewardRow, path))
    assert f"{path}:2: " in str(refusal.value)
    assert said in str(refusal.value)
    bad: list[str] = []
    assert len(list(read_rows(RewardRow, path, on_bad="skip", bad=bad))) == 2
    assert len(bad) == 1


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD_LINE}\n\n{GOOD_LINE}\n\n")
    assert len(list(read_rows(RewardRow, path))) == 2
    path.write_text(f"{GOOD_LINE}\n\nnonsense\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: "):
        list(read_rows(RewardRow, path))


def test_a_torn_last_line_is_said_to_be_torn(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD_LINE}\n{GOOD_LINE[:50]}")
    with pytest.raises(DataError, match="torn"):
        list(read_rows(RewardRow, path))


@pytest.mark.parametrize(("content", "said"), [(b"", "no rows"), (b"\xff\xfe", "not UTF-8"), (None, "cannot be read")])
def test_a_file_that_is_no_row_file_is_refused(content, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        list(read_rows(SFTRow, path))
    assert said in str(refusal.value)


# --- which episodes ----------------------------------------------------------------------------------------------


def judged(key, *, goal=5.0, models=("m", "m"), scenario="s1") -> Judged:
    episode = episode_of(["a", "b"], key=key, models=models, scenario=scenario)
    return Judged.of(episode, None if goal is None else rating_of(episode, goal=goal))


def test_by_default_everybody_is_imitated():
    entries = [judged(1), judged(2, goal=None)]
    assert select_for_cloning(entries, CloningFilter()).seats == {e.episode_id: (0, 1) for e in entries}


def test_both_agents_must_be_the_chosen_model():
    """The paper's script looked at the judge and the first agent instead."""
    entries = [judged(1), judged(2, models=("m", "other")), judged(3, models=("other", "m"))]
    chosen = select_for_cloning(entries, CloningFilter(model="m"))
    assert list(chosen.seats) == [entries[0].episode_id]
    assert chosen.left_out == {"not both agents are the chosen model": 4}


def test_the_goal_must_be_above_the_threshold_and_be_known():
    entries = [judged(1, goal=7), judged(2, goal=7.5), judged(3, goal=None)]
    chosen = select_for_cloning(entries, CloningFilter(goal_above=7))
    assert list(chosen.seats) == [entries[1].episode_id]
    assert chosen.left_out == {"goal score too low": 2, "no goal score": 2}


def test_the_best_of_each_scenario_are_kept():
    entries = [judged(i, goal=i, scenario=f"s{i % 2}") for i in range(6)]
    chosen = select_for_cloning(entries, CloningFilter(best_per_scenario=1))
    assert set(chosen.seats) == {entries[4].episode_id, entries[5].episode_id}
    assert chosen.left_out == {"not among the best of its scenario": 8}


@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.integers(0, 10)), st.sampled_from("mn"), st.sampled_from("ab")), max_size=12
    ),
    st.one_of(st.none(), st.integers(1, 3)),
    st.one_of(st.none(), st.integers(0, 9)),
)
def test_every_agent_is_chosen_or_counted(entries, best, above):
    made = [judged(i, goal=g, models=("m", m), scenario=s) for i, (g, m, s) in enumerate(entries)]
    chosen = select_for_cloning(made, CloningFilter(model="m", best_per_scenario=best, goal_above=above))
    assert sum(len(s) for s in chosen.seats.values()) + sum(chosen.left_out.values()) == 2 * len(made)


# --- splits ------------------------------------------------------------------------------------------------------

ROWS = [row(f"e{i}", f"s{i % 40}") for i in range(400) for _ in range(3)]


@pytest.mark.parametrize("by", ["episode", "scenario"])
def test_a_split_is_stable_and_leaks_nothing(by):
    config = SplitConfig(by=by, validation_fraction=0.2, seed=7)
    train, validation = (list(side) for side in split_rows(lambda: iter(ROWS), config))
    assert len(train) + len(validation) == len(ROWS)
    assert 0.05 < len(validation) / len(ROWS) < 0.4
    check_leaks(train, validation, by=by)
    assert [side_of(r, config) for r in reversed(ROWS)] == [side_of(r, config) for r in ROWS][::-1]
    other = SplitConfig(by=by, validation_fraction=0.2, seed=8)
    assert any(side_of(r, other) != side_of(r, config) for r in ROWS)


def test_a_leak_is_found_and_named():
    with pytest.raises(DataError, match="1 episodes are in both train and validation rows: e1"):
        check_leaks([row("e1"), row("e2")], [row("e1"), row("e3")])
    with pytest.raises(DataError, match="1 scenarios"):
        check_leaks([row("e1", "x")], [row("e2", "x")], by="scenario")


def test_rows_are_made_one_at_a_time(tmp_path):
    """Constant memory: a writer that is stopped has asked for no more than it wrote."""
    made = []

    def rows():
        for i in range(1000):
            made.append(i)
            yield row(f"e{i}")
            if i == 10:
                return

    assert write_rows(rows(), tmp_path / "rows.jsonl") == 11
    first = next(read_rows(PromptRow, tmp_path / "rows.jsonl"))
    assert first.episode_id == "e0"
    assert len(made) == 11
