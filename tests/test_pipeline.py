"""Stages of an experiment whose models fail: none counts as finished without its results, and failures are retried."""

import random
from pathlib import Path

import pytest

from command_line import call
from faulty_server import FaultyServer, reply
from sotopia_rl.errors import ConfigError, SotopiaRLError
from sotopia_rl.experiment import Experiment, is_done, load_experiment, run_stage
from sotopia_rl.llm.limits import Budget, ModelLimits
from sotopia_rl.pipeline import build, check_models, reopen_failed
from sotopia_rl.sandbox.scripted import give_verdict
from sotopia_rl.steps import Run, has_failures

HASTY = ModelLimits(max_retries=0)


def toy(folder: Path, **changes: object) -> Experiment:
    path = folder / "toy.yaml"
    path.write_text("name: toy\nworld: {train_matches: 6, families: [price]}\nsimulate: {max_turns: 4}\n")
    return load_experiment(path, overrides={"judge": {"max_attempts": 1}, **changes})


def a_run(**changes: object) -> Run:
    return Run(lambda _: None, HASTY, Budget(None), **changes)


def verdict(body: dict) -> object:
    return reply(give_verdict(body["messages"][-1]["content"], random.Random(0)))


def through_judging(e: Experiment, stages: Path, **changes: object) -> list[bool]:
    """Run the first three stages; whether each had work."""
    graph = build(e, a_run(**changes))
    return [run_stage(stage, stages) for stage in list(graph.stages.values())[:3]]


def test_a_judge_that_fails_every_time_leaves_its_stage_unfinished_and_the_same_call_goes_on(tmp_path: Path) -> None:
    with FaultyServer(["401"] * 6 + [verdict]) as server:
        e = toy(tmp_path, judge_model=f"custom/j@{server.url}")
        judge = build(e, a_run()).named("judge")[0]
        with pytest.raises(SotopiaRLError, match=r"all 6 judgements failed.*Incorrect API key"):
            through_judging(e, tmp_path / "stages")
        assert not is_done(judge, tmp_path / "stages")
        assert through_judging(e, tmp_path / "stages") == [False, False, True]
        assert not has_failures(judge.folder(tmp_path / "stages"))


def test_a_judge_that_is_down_stops_the_run_and_says_so(tmp_path: Path) -> None:
    e = toy(tmp_path, judge_model="custom/j@http://127.0.0.1:9/v1")
    with pytest.raises(SotopiaRLError, match=r"judgements.*127.0.0.1:9"):
        through_judging(e, tmp_path / "stages")
    assert not is_done(build(e, a_run()).named("judge")[0], tmp_path / "stages")


def test_some_failures_are_told_and_can_be_retried_with_what_was_made_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = tmp_path / "stages"
    with FaultyServer([reply("no verdict"), verdict]) as server:
        e = toy(tmp_path, judge_model=f"custom/j@{server.url}")
        through_judging(e, stages)
        assert "1 of 6 judgements failed (bad_reply)" in caplog.text
        graph = build(e, a_run(retry_failed=True))
        judge, clone = graph.named("judge")[0], graph.named("clone")[0]
        run_stage(clone, stages)
        reopen_failed(graph, stages)
        assert not clone.folder(stages).exists()
        assert through_judging(e, stages, retry_failed=True) == [False, False, True]
        assert not has_failures(judge.folder(stages))
        reopen_failed(graph, stages)
        assert is_done(judge, stages)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge_model": "scripted/jugde"}, "did you mean scripted/judge"),
        ({"evaluate": {"partners": ["scripted/fairr"]}}, "did you mean scripted/fair"),
        ({"annotator_model": "openai/gpt-4o"}, "no key"),
        ({"base": {"path": "nosuchmodel"}}, "no such folder"),
        ({"cast": {"speakers": {"nonsense": 1.0}}}, "names no model"),
    ],
)
def test_models_of_later_stages_are_opened_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], said: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=said):
        check_models(toy(tmp_path, **changes), a_run())


def test_the_run_command_refuses_a_wrong_model_before_it_plays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("name: wrong\njudge_model: scripted/jugde\n")
    assert call("run", recipe, "--output", tmp_path / "run") == 2
    assert "did you mean scripted/judge" in capsys.readouterr().err
    assert not (tmp_path / "run" / "stages").exists()
