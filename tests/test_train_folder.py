import json
from pathlib import Path

import pytest

from sotopia_rl.errors import ConfigError, DataError, TrainingError
from sotopia_rl.train.config import SFTSettings
from sotopia_rl.train.folder import COMPLETE, RunFolder, claim, fingerprint, read_metrics


def make_checkpoint(run: RunFolder, step: int, *, complete: bool) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    if complete:
        (folder / COMPLETE).touch()
    return folder


def test_a_run_goes_on_only_under_its_own_settings_and_inputs(tmp_path: Path) -> None:
    claim(tmp_path, "sft", SFTSettings(), {"rows": "abc"}, resume=True).append_metrics(1, {})
    with pytest.raises(ConfigError, match=r"settings.max_steps was 500, now 7; rows is not what it was"):
        claim(tmp_path, "sft", SFTSettings(max_steps=7), {"rows": "abd"}, resume=True)
    claim(tmp_path, "sft", SFTSettings(), {"rows": "abc"}, resume=True)


def test_a_run_that_was_refused_before_its_first_step_may_be_asked_anew(tmp_path: Path) -> None:
    claim(tmp_path, "sft", SFTSettings(max_length=64), {"base": "wrong"}, resume=True)
    run = claim(tmp_path, "sft", SFTSettings(max_length=128), {"base": "right"}, resume=True)
    assert json.loads(run.settings_file.read_text())["settings"]["max_length"] == 128


def test_an_unfinished_run_is_not_started_over_by_accident(tmp_path: Path) -> None:
    run = claim(tmp_path, "sft", SFTSettings(), {}, resume=False)
    run.append_metrics(1, {})
    with pytest.raises(TrainingError, match="unfinished run; resume it"):
        claim(tmp_path, "sft", SFTSettings(), {}, resume=False)
    run.finish({})
    assert claim(tmp_path, "sft", SFTSettings(), {}, resume=False).finished


def test_a_torn_settings_file_is_named(tmp_path: Path) -> None:
    run = claim(tmp_path, "sft", SFTSettings(), {}, resume=True)
    run.append_metrics(1, {})
    run.settings_file.write_text('{"stage": "sf')
    with pytest.raises(DataError, match=r"settings\.json: cannot be read"):
        claim(tmp_path, "sft", SFTSettings(), {}, resume=True)


def test_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    whole = make_checkpoint(run, 90, complete=True)
    torn = make_checkpoint(run, 100, complete=False)
    assert run.last_checkpoint() == whole
    assert not torn.exists()


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (5, 10, 100):
        make_checkpoint(run, step, complete=True)
    run.prune_checkpoints()
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["checkpoint-100"]


def test_metrics_are_wound_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics(step, {"loss": float("nan") if step == 2 else 0.5})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')
    run.rewind_metrics(2)
    assert read_metrics(run.metrics_file) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_fingerprints_follow_content(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"layers": 2}))
    (model / "model.safetensors").write_bytes(b"x" * 3_000_000)
    first = fingerprint(model)
    (model / "notes.txt").write_text("does not count")
    assert fingerprint(model) == first
    (model / "model.safetensors").write_bytes(b"x" * 2_999_999 + b"y")
    assert fingerprint(model) != first
    with pytest.raises(DataError, match="no such file or folder"):
        fingerprint(tmp_path / "missing")
