"""`simulate`, `judge` and `episodes`, as a shell would call them, over scripted models and a local server."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from io import StringIO

import pytest
from rich.console import Console

from damage import cut_short
from faulty_server import FaultyServer, reply
from real_redis import needs_redis, redis_server
from sotopia_rl.cli import main
from sotopia_rl.commands.episodes import Counts, terminal_lines
from sotopia_rl.commands.options import finish
from sotopia_rl.console import detail
from sotopia_rl.episode import Action, Failure, Usage
from sotopia_rl.store import EpisodeQuery, EpisodeSummary, import_file, open_store
from sotopia_rl.tally import Tally
from store_samples import attribution, episode, rating

SPEAKERS = ["--agent1", "scripted/fair", "--agent2", "scripted/leaky"]


@pytest.fixture
def said(capsys):
    """Call a command: its exit code, stdout and stderr."""

    def call(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def store(tmp_path):
    """Three episodes of samples, one of them failed, one judged."""
    path = tmp_path / "samples.db"
    with open_store(path) as opened:
        opened.add_episodes([episode(0), episode(1), failed()])
        opened.add_rating(rating(episode(0)))
    return path


def failed():
    return episode(2, tag="other", failure=Failure(kind="timeout", message="no reply within 60 seconds", turn=6))


def contents(path):
    with open_store(path, create=False) as opened:
        return list(opened.episodes()), list(opened.ratings())


# list


def test_list_prints_a_line_per_episode_with_tabs_on_a_pipe(said, store):
    code, out, err = said("episodes", "list", "--store", store)
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert [line[0] for line in lines] == sorted(e.id for e in (episode(0), episode(1), failed()))
    by_id = {line[0]: line[1:] for line in lines}
    assert by_id[episode(0).id] == ["completed", "", "6", "code0", "scripted/fair", "scripted/tough", "t"]
    assert by_id[failed().id][:2] == ["agent_failed", "timeout"]
    assert "3 of 3 episodes" in err


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        (["--tag", "t"], {0, 1}),
        (["--status", "agent_failed"], {2}),
        (["--codename", "code1"], {1}),
        (["--scenario-id", "scenario0"], {0}),
        (["--model", "scripted/tough"], {0, 1, 2}),
        (["--tag", "t", "--codename", "code2"], set()),
    ],
)
def test_list_can_be_narrowed(said, store, flags, numbers):
    ids = {episode(0).id: 0, episode(1).id: 1, failed().id: 2}
    _, out, _ = said("episodes", "list", "--store", store, *flags)
    assert {ids[line.split("\t")[0]] for line in out.splitlines()} == numbers


def test_list_can_be_cut(said, store):
    _, out, err = said("episodes", "list", "--store", store, "--limit", 2)
    assert len(out.splitlines()) == 2
    assert "2 of 3 episodes" in err


def test_a_store_that_is_not_there_is_one_line_and_is_not_made(said, tmp_path):
    code, out, err = said("episodes", "list", "--store", tmp_path / "none.db")
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "none.db").exists()


def test_list_counts_ratings_and_failures_if_asked(said, store):
    with open_store(store) as opened:
        opened.add_rating(rating(episode(0), "j2"))
        for item in ("judge/j3", "annotate/0/goal/direct/a", "annotate/1/goal/direct/a"):
            stage, _, rest = item.partition("/")
            opened.add_failure(stage, f"{episode(1).id}/{rest}", Failure(kind="bad_reply", message="x"))
    _, out, _ = said("episodes", "list", "--counts", "--store", store)
    numbers = {line.split("\t")[0]: line.split("\t")[8:] for line in out.splitlines()}
    assert numbers == {episode(0).id: ["2", "0"], episode(1).id: ["0", "3"], failed().id: ["0", "0"]}


@pytest.mark.parametrize("columns", [130, 80, 60])
@pytest.mark.parametrize("counts", [None, Counts(Counter(), Counter())])
def test_a_terminal_shows_ids_scenarios_and_both_models_whole_at_any_width(columns, counts):
    listed = [EpisodeSummary.of(episode(n, tag="pilot-of-may")) for n in range(3)]
    terminal = Console(width=columns, file=StringIO())
    for line in terminal_lines(listed, 8, columns, counts):
        terminal.print(line)
    lines = terminal.file.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) == {130: 3, 80: 6, 60: 9 if counts else 6}[columns]
    for s in listed:
        start = next(i for i, line in enumerate(lines) if line.startswith(s.id[:8] + " "))
        own = lines[start : start + len(lines) // 3]
        assert all(line.startswith(" " * 9) for line in own[1:])
        whole = " ".join(" ".join(own).split())
        assert all(text in whole for text in (s.codename, "scripted/fair / scripted/tough", " pilot-of-may"))


def test_what_a_terminal_shows_of_an_id_is_enough_for_show(said, store):
    command = [sys.executable, "-m", "sotopia_rl.cli", "episodes", "list", "--store", str(store)]
    environment = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "80"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    starts = re.findall(r"^\x1b\[2m(\w+)", shown, flags=re.MULTILINE)
    assert [len(start) for start in starts] == [8, 8, 8]
    assert all(said("episodes", "show", start, "--store", store)[0] == 0 for start in starts)


# show


def test_show_is_a_conversation_with_goals_and_scores(said, store):
    code, out, _ = said("episodes", "show", episode(0).id[:12].lower(), "--store", store)
    assert code == 0
    for text in (
        "code0",
        "Élodie O'Malley",
        "Keep the cat",
        'I said "no": <b>two</b> {things}.',
        "Second paragraph 李雷.",
    ):
        assert text in out
    for text in ("says nothing", "[non-verbal communication] nods", "leaves", "somebody left", "overall", "goal"):
        assert text in out


def test_show_says_why_and_where_an_episode_failed(said, store):
    _, out, _ = said("episodes", "show", failed().id, "--store", store)
    assert "agent_failed at turn 6 (timeout): no reply within 60 seconds" in out


@pytest.mark.parametrize(("start", "words"), [("ZZZZ", "no episode's id starts"), ("", "3 episodes' ids start")])
def test_show_wants_one_episode(said, store, start, words):
    code, _, err = said("episodes", "show", start, "--store", store)
    assert code == 1
    assert words in err


def test_show_tells_what_a_judge_and_an_annotator_gave_no_answer_to(said, store):
    with open_store(store) as opened:
        bad = Failure(kind="bad_reply", message="agent_1: goal: score 12 is outside 0 to 10")
        opened.add_failure("judge", f"{episode(1).id}/custom/j@http://h/v1", bad)
        opened.add_failure("annotate", f"{episode(1).id}/0/goal/direct/openai/x", bad)
        opened.add_failure("judge", f"{episode(0).id}/other", bad)
    out = " ".join(said("episodes", "show", episode(1).id, "--store", store)[1].split())
    assert "judge custom/j@http://h/v1 failed (bad_reply): agent_1: goal: score 12 is outside 0 to 10" in out
    assert "annotate 0/goal/direct/openai/x failed (bad_reply)" in out
    assert "other" not in out


def test_show_finds_ids_in_either_case_and_an_id_that_another_one_starts_with(said, store):
    with open_store(store) as opened:
        for other in ("abc", "abcd"):
            opened.add_episode(episode(0).model_copy(update={"id": other}))
    assert "abc\n" in said("episodes", "show", "abc", "--store", store)[1]
    assert "abcd\n" in said("episodes", "show", "ABCD", "--store", store)[1]
    assert "2 episodes' ids start with 'ab'" in said("episodes", "show", "ab", "--store", store)[2]


# delete


def test_what_would_be_deleted_is_shown_and_nothing_is_deleted_without_yes(said, store):
    before = contents(store)
    code, out, err = said("episodes", "delete", "--tag", "t", "--store", store)
    assert (code, {line.split("\t")[0] for line in out.splitlines()}) == (1, {episode(0).id, episode(1).id})
    assert "nothing is deleted yet; add --yes to delete 2 episodes" in err
    assert contents(store) == before


@pytest.mark.parametrize("kind", ["db", "jsonl", pytest.param("redis", marks=needs_redis)])
def test_episodes_are_deleted_by_id_with_all_that_is_said_of_them(said, store, tmp_path, kind):
    with ExitStack() as stack:
        target = stack.enter_context(redis_server()) if kind == "redis" else tmp_path / f"to.{kind}"
        assert said("episodes", "export", "--store", store, tmp_path / "all.jsonl")[0] == 0
        with open_store(target) as opened:
            import_file(tmp_path / "all.jsonl", opened)
            opened.add_attribution(attribution(episode(0)))
            for e in (episode(0), episode(1)):
                opened.add_failure("judge", f"{e.id}/j", Failure(kind="timeout", message="x"))
        code, _, err = said("episodes", "delete", episode(0).id[:9], failed().id, "--yes", "--store", target)
        assert (code, "2 episodes deleted" in err) == (0, True)
        with open_store(target, create=False) as opened:
            assert opened.ids() == [episode(1).id]
            assert [*opened.ratings(), *opened.attributions()] == []
            assert [item for _, item, _ in opened.failures()] == [f"{episode(1).id}/j"]


def test_episodes_are_deleted_by_choice(said, store):
    assert said("episodes", "delete", "--status", "agent_failed", "--yes", "--store", store)[0] == 0
    assert {e.id for e in contents(store)[0]} == {episode(0).id, episode(1).id}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--yes"], 2, "say which episodes go"),
        (["--yes", "--tag", "t", "0"], 2, "say which episodes go"),
        (["--yes", "--tag", "nosuch"], 1, "tags in this store: other (1), t (2)"),
        (["--yes", "ZZZZ"], 1, "no episode's id starts with 'ZZZZ'"),
    ],
)
def test_a_deletion_that_names_nothing_is_refused(said, store, arguments, code, words):
    before = contents(store)
    ended, _, err = said("episodes", "delete", *arguments, "--store", store)
    assert (ended, words in err) == (code, True)
    assert contents(store) == before


# damaged records


@pytest.fixture
def played(said, tmp_path):
    """Four episodes of the offline world, judged."""
    path = tmp_path / "played.db"
    command = ["simulate", "--manifest", "sandbox-train", "--count", 4, *SPEAKERS, "--judge", "scripted/judge"]
    assert said(*command, "--tag", "t", "--store", path)[0] == 0
    return path


def failures(path):
    with open_store(path, create=False) as opened:
        return {(stage, item): failure for stage, item, failure in opened.failures()}


def test_a_damaged_episode_fails_alone_in_judging_and_annotating_and_can_be_deleted(said, played, caplog):
    where = ["--tag", "t", "--store", played]
    damaged, *healthy = contents(played)[0]
    cut_short(played, damaged.id)

    code, _, err = said("judge", "--judge", "scripted/judge", "--no-resume", *where)
    assert (code, "failed: bad_input 1" in err) == (0, True)
    assert f"episode {damaged.id} cannot be read" in failures(played)["judge", f"{damaged.id}/scripted/judge"].message
    assert f"episode {damaged.id} cannot be read" in caplog.text

    annotate = ["annotate", "--annotator", "scripted/annotator", *where]
    assert said(*annotate, "--dry-run")[0] == 0
    code, _, err = said(*annotate)
    assert (code, "failed: bad_input 2" in err) == (0, True)
    with open_store(played) as opened:
        assert {a.episode_id for a in opened.attributions()} == {e.id for e in healthy}
    items = {item for stage, item in failures(played) if stage == "annotate"}
    assert items == {f"{damaged.id}/{s}/goal,relationship,knowledge/direct/scripted/annotator" for s in (0, 1)}

    code, _, err = said("episodes", "show", damaged.id, "--store", played)
    assert (code, "`sotopia-rl episodes delete`" in err) == (1, True)
    assert said("episodes", "delete", damaged.id, "--yes", "--store", played)[0] == 0
    assert [e.id for e in contents(played)[0]] == [e.id for e in healthy]
    assert failures(played) == {}
    assert said("judge", "--judge", "scripted/judge", "--no-resume", *where)[0] == 0


def test_a_damaged_rating_fails_alone_in_annotating(said, played):
    damaged, *healthy = contents(played)[1]
    cut_short(played, damaged.episode_id, "ratings", "episode_id")
    code, _, err = said("annotate", "--annotator", "scripted/annotator", "--tag", "t", "--store", played)
    assert (code, "failed: bad_input 2" in err) == (0, True)
    with open_store(played) as opened:
        assert {a.episode_id for a in opened.attributions()} == {r.episode_id for r in healthy}


def test_what_would_lack_a_damaged_record_stops_at_it_and_leaves_what_was_there(said, played, tmp_path):
    assert said("annotate", "--annotator", "scripted/annotator", "--tag", "t", "--store", played)[0] == 0
    commands = [
        ["reward", "--tag", "t", "--output", tmp_path / "rows"],
        ["episodes", "export", tmp_path / "all.jsonl"],
        ["episodes", "export", tmp_path / "theirs.jsonl", "--layout", "sotopia"],
    ]
    for command in commands:
        assert said(*command, "--store", played)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    damaged = contents(played)[0][-1]
    cut_short(played, damaged.id)
    for command in [*commands, ["episodes", "export", tmp_path / "copy.db"]]:
        code, _, err = said(*command, "--store", played)
        assert (code, f"episode {damaged.id} cannot be read" in err) == (1, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before


# export and import


def test_what_is_exported_comes_back_the_same(said, store, tmp_path):
    assert said("episodes", "export", tmp_path / "all.jsonl", "--store", store)[0] == 0
    assert said("episodes", "import", tmp_path / "all.jsonl", "--store", tmp_path / "again.db")[0] == 0
    assert contents(tmp_path / "again.db") == contents(store)


def test_a_choice_of_episodes_goes_into_another_store(said, store, tmp_path):
    code, _, err = said("episodes", "export", tmp_path / "few.db", "--store", store, "--tag", "t")
    assert code == 0
    assert "2 episodes, 1 ratings" in err
    assert {e.tag for e in contents(tmp_path / "few.db")[0]} == {"t"}
    code, _, _ = said("episodes", "import", store, "--store", tmp_path / "few.db", "--status", "agent_failed")
    assert contents(tmp_path / "few.db") == contents(store)


def test_sotopias_lines_hold_what_sotopia_knows_and_say_what_was_left_out(said, store, tmp_path):
    code, _, err = said("episodes", "export", tmp_path / "s.jsonl", "--store", store, "--layout", "sotopia")
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert episode(0).id in {line["episode_id"] for line in lines}
    assert failed().id not in {line["episode_id"] for line in lines}
    assert "Left out: " in err
    assert said("episodes", "import", tmp_path / "s.jsonl", "--store", tmp_path / "back.db")[0] == 0
    back = {e.id: e for e in contents(tmp_path / "back.db")[0]}
    assert [t.action for t in back[episode(0).id].turns] == [t.action for t in episode(0).turns]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tag", "nosuch"], "no episode has the tag 'nosuch'; tags in this store: other (1), t (2)"),
        (
            ["--tag", "t", "--status", "agent_failed"],
            "no agent_failed episode has the tag 't'; tags in this store:",
        ),
        (["--model", "x", "--codename", "y"], "no episode has the model 'x' and the codename 'y'; tags in this store"),
        (["--layout", "sotopia", "--judge", "x"], "no episode was rated by 'x'; judges in this store: scripted/judge"),
        (["--layout", "sotopia", "--codename", "code1"], "no place for any episode: 1 not judged"),
    ],
)
def test_an_export_of_nothing_is_refused_and_leaves_the_older_file(said, store, tmp_path, flags, words):
    target = tmp_path / "all.jsonl"
    said("episodes", "export", target, "--store", store)
    before = target.read_bytes()
    code, _, err = said("episodes", "export", target, "--store", store, *flags)
    assert (code, err.count("\n")) == (1, 1)
    assert words in err
    assert target.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_nothing_is_copied_from_store_to_store_where_nothing_is_meant(said, store, tmp_path):
    for command in (["export", tmp_path / "new.db", "--store", store], ["import", store, "--store", tmp_path / "n.db"]):
        code, _, err = said("episodes", *command, "--tag", "nosuch")
        assert (code, "tags in this store: other (1), t (2)" in err) == (1, True)
    assert not (tmp_path / "new.db").exists()


def test_a_torn_line_is_refused_or_skipped_as_told(said, store, tmp_path):
    said("episodes", "export", tmp_path / "torn.jsonl", "--store", store)
    torn = (tmp_path / "torn.jsonl").read_text().rstrip("\n")[:-20]
    (tmp_path / "torn.jsonl").write_text(torn)
    code, _, err = said("episodes", "import", tmp_path / "torn.jsonl", "--store", tmp_path / "a.db")
    assert code == 1
    assert "torn.jsonl:" in err
    assert said("episodes", "import", tmp_path / "torn.jsonl", "--store", tmp_path / "b.db", "--skip-torn-line")[0] == 0


# simulate and judge


def test_a_simulated_tag_is_continued_and_judged_later(said, tmp_path):
    where = ["--tag", "t", "--store", tmp_path / "e.db"]
    play = ["simulate", "--manifest", "sandbox-train", *SPEAKERS, *where]
    assert said(*play, "--count", 3)[0] == 0
    code, _, err = said(*play, "--count", 5)
    assert code == 0
    assert "2 of 2 episodes; 3 were there already" in err
    assert not contents(tmp_path / "e.db")[1]
    assert said("judge", "--judge", "scripted/judge", *where)[0] == 0
    episodes, ratings = contents(tmp_path / "e.db")
    assert {r.episode_id for r in ratings} == {e.id for e in episodes}
    code, _, err = said("judge", "--judge", "scripted/judge", *where)
    assert (code, "0 of 0 judgements" in err) == (0, True)


def test_failed_matches_are_played_again_alone(said, tmp_path):
    leave = reply(Action(action_type="leave").to_json())
    answers = [*[reply("no")] * 3, leave]  # the first match's three attempts
    with FaultyServer(answers) as server:
        agent = f"custom/any@{server.url}"
        command = ["simulate", "--manifest", "sandbox-train", "--count", 3, "--agent1", agent, "--agent2", agent]
        command += ["--tag", "t", "--store", tmp_path / "e.db", "--concurrency", 1]
        code, _, err = said(*command)
        assert (code, "failed: bad_reply 1" in err) == (0, True)
        assert "0 of 0 episodes; 3 were there already" in said(*command)[2]
        code, _, err = said(*command, "--retry-failed")
        assert (code, "1 of 1 episodes; 2 were there already" in err) == (0, True)
    with open_store(tmp_path / "e.db") as opened:
        assert opened.count(EpisodeQuery(status="completed")) == 3


def test_a_judge_that_always_fails_ends_the_command_with_an_error(said, tmp_path):
    with FaultyServer(["400"]) as server:
        code, _, err = said(
            *["simulate", "--manifest", "sandbox-train", "--count", 2, *SPEAKERS, "--tag", "t"],
            *["--store", tmp_path / "e.db", "--judge", f"custom/j@{server.url}"],
        )
    assert code == 1
    assert "all 2 judgements failed" in err
    assert len(contents(tmp_path / "e.db")[0]) == 2


# Progress


def test_progress_tells_failures_by_cause_calls_tokens_and_cost():
    tally = Tally("episodes", total=5)
    tally.add(None, Usage(calls=20, prompt_tokens=100_000, completion_tokens=2_000, cost_usd=0.5))
    tally.add(Failure(kind="timeout", message="x"), Usage())
    tally.add(Failure(kind="bad_reply", message="x"), Usage(calls=2))
    assert detail(tally) == "bad_reply 1, timeout 1; 22 calls, 102.0k tokens; $0.50"
    assert str(tally) == "1 of 5 episodes; failed: bad_reply 1, timeout 1"


def test_finishing_a_stopped_stage_is_an_error_that_says_why(capsys):
    from sotopia_rl.errors import SotopiaRLError

    tally = Tally("judgements", total=5, done=2, stopped="j: spend cap reached")
    with pytest.raises(SotopiaRLError, match="stopped after 2 of 5 judgements: j: spend cap reached"):
        finish(tally)
    assert "2 of 5 judgements" in capsys.readouterr().err
