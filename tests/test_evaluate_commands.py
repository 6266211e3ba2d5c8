"""`evaluate` through the command line: panels, resuming, and everything that is wrong named with its counts."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from command_line import call
from damage import cut_short
from faulty_server import Answer, FaultyServer, reply
from sotopia_rl.evaluate.folder import load_plan
from sotopia_rl.results import load_results
from sotopia_rl.sandbox.scripted import give_verdict
from sotopia_rl.store import EpisodeQuery, open_store

WORLD = ["--manifest", "sandbox-held-out", "--count", 8]
SYSTEMS = ["--system", "tough=scripted/tough", "--system", "fair=scripted/fair"]
PARTNERS = ["--partner", "scripted/fair", "--partner", "scripted/generous"]
JUDGE = ["--judge", "scripted/judge"]
QUICK = ["--max-retries", 0, "--backoff-seconds", 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    assert call("evaluate", *WORLD, *SYSTEMS, *PARTNERS, *JUDGE, "--output", folder) == 0
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def another_judge(*, fails: float = 0.0, wobble: float = 0.0) -> Callable[[dict[str, Any]], Answer]:
    """The offline world's judge over HTTP, stricter by a point on goal, which may fail or waver."""

    def answer(body: dict[str, Any]) -> Answer:
        prompt = body["messages"][0]["content"]
        if "agent_1" not in prompt:
            return reply("yes")
        rng = random.Random(f"{prompt} {body.get('seed')}")
        if random.Random(prompt).random() < fails:
            return reply("I would rather not say.")
        verdict = json.loads(give_verdict(prompt, rng))
        for agent in verdict.values():
            score = agent["goal"]["score"] - 1 + (rng.choice([-1, 0, 1]) if wobble else 0)
            agent["goal"]["score"] = min(10, max(0, score))
        return reply(json.dumps(verdict))

    return answer


# --- panels, resuming, adding --------------------------------------------------------------------------------------


def test_a_second_call_plays_and_judges_nothing(run, capsys):
    before = (run / "results.json").read_bytes()
    assert call("evaluate", "play", *WORLD, *SYSTEMS, *PARTNERS, *JUDGE, "--output", run) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "0 of 0 episodes of tough; 16 were there already" in err
    assert "0 of 0 judgements of fair by scripted/judge; 16 were there already" in err
    assert (run / "results.json").read_bytes() == before


def test_compare_gives_the_same_numbers_without_playing(run, tmp_path):
    assert call("evaluate", "compare", run, "--output", tmp_path) == 0
    assert load_results(tmp_path / "results.json") == load_results(run / "results.json")
    page = (tmp_path / "report.html").read_text()
    assert 'id="side-by-side"' in page
    assert "calls and cost" in page


def test_a_wanted_difference_and_a_level_can_be_asked_for(copy):
    assert call("evaluate", "compare", copy, "--wanted-points", 2, "--confidence", 0.9, "--baseline", "fair") == 0
    found = load_results(copy / "results.json")
    assert (found.config.wanted_points, found.config.confidence) == (2.0, 0.9)
    assert {(row.system_a, row.system_b) for row in found.rows} == {("tough", "fair")}


def test_report_writes_the_page_of_an_evaluation_again_with_published_figures(copy, capsys):
    (copy / "report.html").unlink()
    assert call("report", copy, "--published") == 0
    assert 'id="published"' in (copy / "report.html").read_text()
    assert "fair - tough" in capsys.readouterr().out


def test_systems_and_partners_can_be_added_to_a_run(copy):
    more = ["--system", "rude=scripted/rude", "--system", "tough=scripted/tough"]
    assert call("evaluate", "play", *WORLD, *more, "--partner", "scripted/leaky", *JUDGE, "--output", copy) == 0
    plan = load_plan(copy)
    assert list(plan.systems) == ["tough", "fair", "rude"]
    found = load_results(copy / "results.json")
    assert found.partners == ("scripted/fair", "scripted/generous", "scripted/leaky")
    assert {(s.system, s.planned, s.scored) for s in found.systems} == {(n, 24, 24) for n in ("tough", "fair", "rude")}


def test_another_judge_rates_stored_episodes_again_and_nothing_is_played(copy, capsys):
    with FaultyServer([another_judge(wobble=1.0)]) as server:
        judge = f"custom/strict@{server.url}"
        assert call("evaluate", "rejudge", copy, "--judge", judge, "--repeat-judge", 2, *QUICK) == 0
        # 32 conversations twice, and one word asked before
        assert len(server.bodies) == 65
    assert "episodes" not in capsys.readouterr().err
    found = load_results(copy / "results.json")
    assert found.judges == ("scripted/judge", judge)
    noise = {n.judge: n.sd for n in found.judge_noise if n.metric == "goal"}
    assert "scripted/judge" not in noise
    assert 0.3 < noise[judge] < 1.5
    agreement = next(a for a in found.agreement if a.metric == "goal")
    assert agreement.means[judge] < agreement.means["scripted/judge"]
    assert agreement.alpha < 1
    sources = {c.source: c for c in found.spreads[0].components}
    assert sources["judge noise"].variance > 0
    assert sources["judge"].note == "2 judges: speaks of these, hardly of others"
    assert {part.by for part in found.parts} == {"judge", "partner"}


def test_runs_of_one_manifest_are_compared_together(run, tmp_path):
    other = tmp_path / "other"
    rude = ["--system", "rude=scripted/rude", "--system", "leaky=scripted/leaky"]
    assert call("evaluate", *WORLD, *rude, *PARTNERS, *JUDGE, "--output", other) == 0
    assert call("evaluate", "compare", run, other, "--output", tmp_path / "both") == 0
    rows = load_results(tmp_path / "both" / "results.json").rows
    assert {(row.system_a, row.system_b) for row in rows} == {(n, "tough") for n in ("fair", "rude", "leaky")}


# --- bad input -----------------------------------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which is the error."""
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert line.startswith("sotopia-rl: ")
    return line


def test_different_manifests_are_refused_with_counts(run, tmp_path, capsys):
    other = tmp_path / "other"
    rude = ["--system", "rude=scripted/rude", "--system", "leaky=scripted/leaky"]
    assert (
        call("evaluate", "--manifest", "sandbox-held-out", "--count", 6, *rude, *PARTNERS, *JUDGE, "--output", other)
        == 0
    )
    assert call("evaluate", "compare", run, other, "--output", tmp_path / "both") == 1
    assert "different manifests with 6 matches in common" in one_line(capsys)
    assert call("evaluate", *WORLD, *SYSTEMS, *PARTNERS, *JUDGE, "--output", other) == 2
    assert "holds an evaluation over sandbox-held-out (6 matches" in one_line(capsys)


def test_other_settings_are_refused_by_name(run, capsys):
    assert call("evaluate", *WORLD, *SYSTEMS, *PARTNERS, *JUDGE, "--output", run, "--temperature", 0.2) == 2
    assert "other settings: temperature (0.7, now 0.2)" in one_line(capsys)
    assert call("evaluate", *WORLD, *SYSTEMS, *PARTNERS, *JUDGE, "--output", run, "--max-turns", 6) == 2
    assert "simulate.max_turns (20, now 6)" in one_line(capsys)
    renamed = ["--system", "tough=scripted/rude", "--system", "fair=scripted/fair"]
    assert call("evaluate", *WORLD, *renamed, *PARTNERS, *JUDGE, "--output", run) == 2
    assert "system tough (scripted/tough, now scripted/rude)" in one_line(capsys)


def test_judges_that_differ_between_runs_are_refused(run, copy, tmp_path, capsys):
    with FaultyServer([another_judge()]) as server:
        assert call("evaluate", "rejudge", copy, "--judge", f"custom/strict@{server.url}", *QUICK) == 0
    assert call("evaluate", "compare", run, copy, "--output", tmp_path / "both") == 1
    assert "were judged by different judges: custom/strict@" in one_line(capsys)


def test_one_name_in_two_runs_is_refused(run, copy, tmp_path, capsys):
    assert call("evaluate", "compare", run, copy, "--output", tmp_path / "both") == 1
    assert "fair, tough is a system of" in one_line(capsys)
    assert call("evaluate", "compare", run, copy) == 2
    assert "--output" in one_line(capsys)


def test_a_judge_that_fails_on_some_episodes_leaves_them_out_and_is_counted(copy, capsys):
    with FaultyServer([another_judge(fails=0.3)]) as server:
        judge = f"custom/shy@{server.url}"
        assert call("evaluate", "rejudge", copy, "--judge", judge, *QUICK) == 0
    found = load_results(copy / "results.json")
    lacking = [s.failures.get(f"judge failed: bad_reply ({judge})", 0) for s in found.systems]
    assert sum(lacking) > 0
    assert all(s.scored == s.planned - count for s, count in zip(found.systems, lacking, strict=True))
    row = found.row("fair", "tough", "sampled", "goal")
    assert row.num_pairs + row.num_excluded == 16
    assert row.worst < row.difference < row.best
    alone = {p.name: p.row.num_pairs for p in found.parts if p.by == "judge" and p.row.metric == "goal"}
    assert alone["scripted/judge"] == 16
    assert alone[judge] == row.num_pairs
    assert "judge failed: bad_reply" in (copy / "report.html").read_text()


def test_a_system_with_failures_keeps_them_counted_bounded_and_apart(tmp_path, capsys):
    systems = ["--system", "fair=scripted/fair", "--system", "garbled=scripted/garbled"]
    play = [
        "evaluate",
        *WORLD,
        *systems,
        "--partner",
        "scripted/fair",
        *JUDGE,
        "--output",
        tmp_path,
        "--max-attempts",
        2,
    ]
    assert call(*play) == 0
    found = load_results(tmp_path / "results.json")
    broken = next(s for s in found.systems if s.system == "garbled")
    assert broken.failures.keys() == {"agent_failed: bad_reply"}
    assert 0 < broken.scored < broken.planned == 8
    row = found.row("garbled", "fair", "sampled", "goal")
    assert (row.num_pairs, row.num_excluded) == (broken.scored, 8 - broken.scored)
    assert row.worst < row.difference < row.best
    capsys.readouterr()
    assert call(*play, "--retry-failed") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert f"of {8 - broken.scored} episodes of garbled; {broken.scored} were there already" in err
    assert "0 of 0 episodes of fair; 8 were there already" in err


@pytest.mark.parametrize("place", ["system", "partner", "judge"])
def test_a_model_that_does_not_answer_is_found_before_anything_is_played(tmp_path, capsys, place):
    silent = "custom/x@http://127.0.0.1:9/v1"
    systems = [*SYSTEMS[:2], "--system", f"fair={silent if place == 'system' else 'scripted/fair'}"]
    partner = ["--partner", silent if place == "partner" else "scripted/fair"]
    judge = ["--judge", silent if place == "judge" else "scripted/judge"]
    assert call("evaluate", *WORLD, *systems, *partner, *judge, "--output", tmp_path, *QUICK) == 1
    line = one_line(capsys)
    assert f"{silent}: cannot connect" in line
    assert "Nothing was played or judged" in line
    assert not list(tmp_path.glob("*.db"))


def test_every_silent_model_is_named_at_once(tmp_path, capsys):
    with FaultyServer(["404"]) as server:
        systems = ["--system", f"a=custom/gone@{server.url}", "--system", "b=custom/x@http://127.0.0.1:9/v1"]
        assert (
            call("evaluate", *WORLD, *systems, "--partner", "scripted/fair", *JUDGE, "--output", tmp_path, *QUICK) == 1
        )
    line = one_line(capsys)
    assert "custom/gone@" in line
    assert "no such model" in line
    assert "custom/x@http://127.0.0.1:9/v1: cannot connect" in line


def test_duplicated_episodes_are_refused_with_counts(copy, capsys):
    with closing(open_store(copy / "fair.db")) as store:
        for episode in list(store.episodes(EpisodeQuery(limit=3))):
            store.add_episode(episode.model_copy(update={"id": f"{episode.id[:-1]}0", "tag": "again"}))
    assert call("evaluate", "compare", copy) == 1
    assert "'fair': 3 sampled pairs have more than one episode" in one_line(capsys)


def test_a_damaged_episode_stops_a_comparison_and_is_played_anew_once_it_is_deleted(run, copy, tmp_path, capsys):
    before = (copy / "results.json").read_bytes()
    with closing(open_store(copy / "fair.db")) as store:
        damaged = store.ids()[3]
    cut_short(copy / "fair.db", damaged)
    for command in (["compare", copy], ["bundle", copy, "--output", tmp_path / "b.zip"]):
        assert call("evaluate", *command) == 1
        assert f"fair.db: episode {damaged} cannot be read" in capsys.readouterr().err
    assert (copy / "results.json").read_bytes() == before
    assert not (tmp_path / "b.zip").exists()
    assert call("episodes", "delete", damaged, "--yes", "--store", copy / "fair.db") == 0
    assert call("evaluate", "play", *WORLD, *SYSTEMS, *PARTNERS, *JUDGE, "--output", copy) == 0
    assert load_results(copy / "results.json").rows == load_results(run / "results.json").rows


def test_an_empty_intersection_is_refused_with_counts(copy, capsys):
    for name, kept in (("tough", 0), ("fair", 1)):
        with closing(open_store(copy / f"{name}.db")) as store:
            matches = sorted({e.match.id for e in store.episodes()})
            store.delete_episodes([e.id for e in store.episodes() if matches.index(e.match.id) % 2 == kept])
    assert call("evaluate", "compare", copy) == 1
    line = one_line(capsys)
    assert "share no scored sampled pair" in line
    assert "'fair' has 8 scores of 16 (not played 8)" in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--system", "a=scripted/fair"], 2, "1 systems with 1 different names"),
        (["--system", "a=scripted/fair", "--system", "scripted/tough"], 2, "--system takes NAME=MODEL"),
        (["--system", "../a=scripted/fair", "--system", "b=scripted/tough"], 2, "'../a' cannot name a system"),
        ([*SYSTEMS, "--judge", "scripted/judge"], 2, "scripted/judge stands there twice"),
        ([*SYSTEMS, "--partner", "scripted/fare"], 2, "did you mean scripted/fair?"),
        ([*SYSTEMS, "--max-cost", 1, "--partner", "custom/x@http://127.0.0.1:9/v1"], 2, "its price is not known"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_played(tmp_path, capsys, arguments, code, message):
    given = ["--partner", "scripted/fair", *JUDGE, "--output", tmp_path / "run"]
    assert call("evaluate", *WORLD, *arguments, *given) == code
    assert message in one_line(capsys)
    assert not list(tmp_path.rglob("*.db"))


def test_a_folder_without_an_evaluation_is_named_with_what_to_do(tmp_path, capsys):
    assert call("evaluate", "compare", tmp_path) == 1
    assert "no evaluation in it; `sotopia-rl evaluate play --output" in one_line(capsys)


def test_an_unknown_baseline_is_refused_with_those_there_are(run, tmp_path, capsys):
    assert call("evaluate", "compare", run, "--output", tmp_path, "--baseline", "stf") == 2
    assert "no system is called 'stf'; there are tough, fair" in one_line(capsys)


def test_a_system_that_fails_everywhere_is_refused_with_counts(tmp_path, capsys):
    with FaultyServer([reply("Let us just talk.")]) as server:
        systems = ["--system", "fair=scripted/fair", "--system", f"prose=custom/prose@{server.url}"]
        play = ["evaluate", *WORLD, *systems, "--partner", "scripted/fair", *JUDGE, "--output", tmp_path, *QUICK]
        assert call(*play) == 1
    assert "'prose' has 0 scores of 8 (agent_failed: bad_reply 8); 'fair' has 8 scores of 8" in one_line(capsys)
    assert not (tmp_path / "results.json").exists()


def test_a_system_that_fails_everywhere_leaves_the_other_comparisons_and_ends_with_1(tmp_path, capsys):
    with FaultyServer([reply("Let us just talk.")]) as server:
        systems = [*SYSTEMS, "--system", f"prose=custom/prose@{server.url}"]
        play = ["evaluate", *WORLD, *systems, "--partner", "scripted/fair", *JUDGE, "--output", tmp_path, *QUICK]
        assert call(*play) == 1
    said = capsys.readouterr()
    assert "no scored pair for prose - tough; the rest was compared and written" in said.err
    assert "difference in goal between fair and tough is shown" in said.out
    lacking = "no pair has a score on both sides, 8 left out (prose: agent_failed: bad_reply 8)"
    assert lacking in said.out
    found = load_results(tmp_path / "results.json")
    assert {(row.system_a, row.system_b) for row in found.rows} == {("fair", "tough")}
    page = (tmp_path / "report.html").read_text()
    assert lacking in page
    assert "agent_failed: bad_reply 8</td>" in page
    assert call("evaluate", "bundle", tmp_path, "--output", tmp_path / "b.zip") == 0
    assert call("evaluate", "verify", tmp_path / "b.zip") == 0


def test_where_every_system_fails_the_causes_are_given(tmp_path, capsys):
    with FaultyServer([reply("Let us just talk.")]) as server:
        systems = ["--system", f"a=custom/a@{server.url}", "--system", f"b=custom/b@{server.url}"]
        play = ["evaluate", *WORLD, *systems, "--partner", "scripted/fair", *JUDGE, "--output", tmp_path, *QUICK]
        assert call(*play) == 1
    assert one_line(capsys).endswith(
        "none of the 16 episodes has a rating by scripted/judge: agent_failed: bad_reply 16"
    )


@pytest.mark.parametrize("place", ["fair=scripted/nobody", "fair=custom/x@http://127.0.0.1:9/v1"])
@pytest.mark.parametrize("kind", ["play", "matrix"])
def test_a_wrong_model_does_not_claim_the_folder(tmp_path, capsys, kind, place):
    partner = ["--partner", "scripted/fair"] if kind == "play" else []
    given = ["evaluate", kind, *WORLD, *partner, *JUDGE, "--output", tmp_path / "run", *QUICK, *SYSTEMS[:2]]
    assert call(*given, "--system", place) != 0
    assert not (tmp_path / "run").exists()
    assert call(*given, *SYSTEMS[2:]) == 0


@pytest.mark.parametrize("judge", ["scripted/nobody", "custom/x@http://127.0.0.1:9/v1"])
def test_a_wrong_judge_does_not_enter_the_plan(copy, judge):
    assert call("evaluate", "rejudge", copy, "--judge", judge, *QUICK) != 0
    assert load_plan(copy).judges == ("scripted/judge",)
    assert call("evaluate", "compare", copy) == 0
