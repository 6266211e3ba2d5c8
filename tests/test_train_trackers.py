from importlib.util import find_spec
from pathlib import Path

import pytest

from sotopia_rl.errors import MissingExtraError
from sotopia_rl.train.folder import RunFolder, claim, read_metrics
from sotopia_rl.train.sft import train_sft
from sotopia_rl.train.trackers import TRACKERS, numbers_of, tracking
from training_settings import SFT


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_what_the_metrics_file_has_also_after_a_kill(rows: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = SFT.model_copy(update={"max_steps": 4, "trackers": ("tensorboard",)})

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(rows, base, settings, tmp_path, progress=stop)
    train_sft(rows, base, settings, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    found = curves(tmp_path / "tensorboard")
    for name in ("loss", "eval_loss", "learning_rate"):
        assert found[name] == [(line["step"], pytest.approx(line[name])) for line in lines if name in line]


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_read(rows: Path, tmp_path: Path) -> None:
    missing = [name for name in TRACKERS if find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed")
    with pytest.raises(MissingExtraError, match=rf"pip install 'sotopia-rl\[{missing[0]}\]'"):
        train_sft(rows, rows.parent, SFT.model_copy(update={"trackers": (missing[0],)}), tmp_path)


def test_a_run_goes_on_under_other_trackers(tmp_path: Path) -> None:
    claim(tmp_path, "sft", SFT, {}, resume=True)
    claim(tmp_path, "sft", SFT.model_copy(update={"trackers": ("wandb",), "push_to_hub": "a/b"}), {}, resume=True)


def test_only_finite_numbers_are_handed_on() -> None:
    values = {"loss": 0.5, "step": 3, "warning": "the policy collapses", "kl": float("nan"), "none": None}
    assert numbers_of(values) == {"loss": 0.5, "step": 3.0}


def test_nothing_is_opened_where_nothing_is_logged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with tracking(run, SFT.model_copy(update={"trackers": ("tensorboard",)})):
        assert len(run.listeners) == 1
    assert run.listeners == []
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_weights_and_biases_takes_the_metrics_offline(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_sft(rows, base, SFT.model_copy(update={"max_steps": 2, "trackers": ("wandb",)}), tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
