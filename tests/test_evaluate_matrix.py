"""Every pair plays the same boards with the seats changed; ties are ties, and what is missing is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import call
from sotopia_rl.episode import Failure
from sotopia_rl.errors import EvaluationError
from sotopia_rl.evaluate.folder import load_plan
from sotopia_rl.evaluate.matrix import STORE, boards, load_matrix, matrix_results, pairings_of
from sotopia_rl.manifest import load_manifest
from sotopia_rl.store import open_store

SPEAKERS = ("tough", "fair", "generous")
SYSTEMS = [part for name in SPEAKERS for part in ("--system", f"{name}=scripted/{name}")]
WORLD = ["--manifest", "sandbox-held-out", "--count", 8, "--judge", "scripted/judge"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    assert call("evaluate", "matrix", *WORLD, *SYSTEMS, "--output", folder) == 0
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """The store of a copy of the run, to damage, and what computes its results."""
    import shutil

    folder = shutil.copytree(run, tmp_path / "run")
    plan, manifest = load_plan(folder), load_manifest(folder / "manifest.json")
    return open_store(folder / STORE), lambda **options: matrix_results(folder, plan, manifest, **options)


def test_every_pair_meets_on_every_board_both_ways_round(run):
    plan, manifest = load_plan(run), load_manifest(run / "manifest.json")
    played = [(p.match.id, *(agent.model for agent in p.agents)) for p in pairings_of(plan, manifest)]
    assert len(set(played)) == len(played) == 3 * 2 * len(boards(manifest))
    assert {p.match.seat for p in pairings_of(plan, manifest)} == {0}
    results = load_matrix(run / "matrix.json")
    assert [m.num_comparisons for m in results.meetings] == [16, 16, 16]


def test_the_tough_outscore_the_generous_and_both_sides_are_shown(run):
    results = load_matrix(run / "matrix.json")
    by_name = {s.system: s for s in results.standings}
    assert by_name["tough"].strength > by_name["generous"].strength
    assert by_name["generous"].high < 0
    assert by_name["generous"].mean_of_both > by_name["generous"].mean
    assert sum(s.strength for s in results.standings) == pytest.approx(0, abs=1e-9)
    for s in results.standings:
        assert s.won + s.tied + s.lost == 32
    page = (run / "matrix.html").read_text()
    assert "leads in goal" in page or "its lead is not shown" in page
    assert "http:" not in page
    assert "https:" not in page
    assert "| tough | scripted/tough |" in (run / "matrix.md").read_text()


def test_the_difference_of_two_models_is_the_mean_over_equal_seats(run):
    store = open_store(run / STORE, create=False)
    goal: dict[tuple[str, int, str], float] = {}
    for episode, rating in store.rated():
        names = [agent.model.split("/")[1] for agent in episode.agents]
        if set(names) == {"tough", "fair"}:
            for seat in (0, 1):
                goal[episode.match.id, seat, names[seat]] = rating.points(seat)["goal"]
    seats = sorted({key[:2] for key in goal})
    expected = sum(goal[(*seat, "tough")] - goal[(*seat, "fair")] for seat in seats) / len(seats)
    (meeting,) = [m for m in load_matrix(run / "matrix.json").meetings if (m.system_a, m.system_b) == ("tough", "fair")]
    assert meeting.difference.value == pytest.approx(expected)
    assert meeting.mean_a - meeting.mean_b == pytest.approx(expected)


def test_a_second_call_plays_nothing_and_changes_nothing(run, capsys):
    before = (run / "matrix.json").read_bytes()
    assert call("evaluate", "matrix", *WORLD, *SYSTEMS, "--output", run) == 0
    assert "0 of 0 episodes; 48 were there already" in " ".join(capsys.readouterr().err.split())
    assert (run / "matrix.json").read_bytes() == before


def test_scores_within_the_margin_tie(copied):
    _, results = copied
    strict, loose = results(), results(tie_margin=10.0)
    assert sum(m.tied for m in loose.meetings) == 48
    assert sum(m.tied for m in strict.meetings) < 48
    assert {s.strength for s in loose.standings} == {0.0}


def test_a_missing_rating_is_left_out_and_counted(copied):
    store, results = copied
    episode = next(e for e in store.episodes() if {a.model for a in e.agents} == {"scripted/tough", "scripted/fair"})
    store.delete_episodes([episode.id])
    left_out = {(m.system_a, m.system_b): m.left_out for m in results().meetings}
    assert left_out == {("tough", "fair"): {"not played": 2}, ("tough", "generous"): {}, ("fair", "generous"): {}}


def test_a_failed_judgement_is_named_by_its_cause(copied):
    store, results = copied
    (episode, *_) = (e for e in store.episodes() if "scripted/generous" in {a.model for a in e.agents})
    store.delete_episodes([episode.id])
    store.add_episode(episode)
    store.add_failure("judge", f"{episode.id}/scripted/judge", Failure(kind="bad_reply", message="prose"))
    assert sum(m.left_out.get("judge failed: bad_reply", 0) for m in results().meetings) == 2


def test_models_that_share_no_scored_board_are_not_ranked(copied):
    store, results = copied
    lonely = [e.id for e in store.episodes() if "scripted/generous" in {a.model for a in e.agents}]
    store.delete_episodes(lonely)
    with pytest.raises(
        EvaluationError, match=r"2 groups share no scored board: tough, fair \| generous; .*not played 32"
    ):
        results()


def test_an_unknown_metric_is_refused_with_those_there_are(run, capsys):
    assert call("evaluate", "matrix", *WORLD, *SYSTEMS, "--output", run, "--metric", "charm") == 1
    assert "there is no metric 'charm'; the judges gave believability" in capsys.readouterr().err


def test_a_matrix_and_a_comparison_do_not_share_a_folder(run, capsys):
    panel = ["--partner", "scripted/fair", "--output", run]
    assert call("evaluate", "play", *WORLD, *SYSTEMS, *panel) == 2
    assert "holds a matrix; choose another folder" in capsys.readouterr().err
    assert call("evaluate", "compare", run) == 1
    assert "holds a matrix" in capsys.readouterr().err


def test_a_file_that_holds_no_matrix_is_refused(tmp_path):
    from sotopia_rl.errors import DataError

    (tmp_path / "m.json").write_text(json.dumps({"standings": 3}))
    with pytest.raises(DataError, match="not the results of a matrix"):
        load_matrix(tmp_path / "m.json")


def test_the_pages_say_how_it_was_played_and_what_it_took(run):
    for name in ("matrix.html", "matrix.md"):
        text = (run / name).read_text(encoding="utf-8")
        for fact in ("temperature", "agents, default", "judge, default", "calls and cost", "conversations"):
            assert fact in text
    assert "{'" not in (run / "matrix.md").read_text(encoding="utf-8")
