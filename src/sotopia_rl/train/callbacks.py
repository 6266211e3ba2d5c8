"""What happens beside a trainer's steps: metrics, checkpoints, the best adapter, early stopping, progress.

All of it is a function of the trainer's own state, which its checkpoints hold, so that a resumed run
decides as the unbroken one would have.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sotopia_rl.errors import TrainingError
from sotopia_rl.train.folder import COMPLETE, RunFolder, checkpoint_step, read_json, write_json, write_text
from sotopia_rl.train.processes import from_main, is_main, main_first, wait_for_all

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass
class Record(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Writes metrics, marks checkpoints as complete, reports progress, stops a run that has diverged."""

    run: RunFolder
    progress: Progress | None = None
    names: Mapping[str, str | None] = field(default_factory=dict)
    """Our name for a trainer's metric; None leaves it out."""
    started: float = field(default_factory=time.monotonic)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Write a line of metrics, and stop a run that has nothing left to train.

        Raises:
            TrainingError: Loss or gradients are no numbers any more.
        """
        if "train_runtime" in logs:
            return
        if state.is_world_process_zero:
            named = {self.names.get(name, name): value for name, value in logs.items()}
            values = {name: value for name, value in named.items() if name is not None}
            self.run.append_metrics(state.global_step, values)
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingError(
                    f"step {state.global_step}: {name} is {logs[name]}; lower learning_rate or use dtype: float32, in "
                    f"a new folder (the last sound checkpoint is in {self.run.checkpoints})"
                )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete, once every process has written its part, then remove older ones."""
        wait_for_all()
        if state.is_world_process_zero:
            write_text(self.run.checkpoints / f"checkpoint-{state.global_step}" / COMPLETE, "")
            self.run.prune_checkpoints()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report progress."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)


@dataclass
class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Saves the adapter whenever the watched metric is the best so far, and may stop early.

    Attributes:
        save: Writes the current weights into a folder.
        metric: A key of the trainer's log.
        sign: 1 where more is better, -1 where less is.
        patience: Stop after this many worse values in a row.
    """

    run: RunFolder
    save: Callable[[Path], None]
    metric: str = "eval_loss"
    sign: int = -1
    patience: int | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the newest value with all before it."""
        values = [self.sign * entry[self.metric] for entry in state.log_history if self.metric in entry]
        best = max(range(len(values)), key=lambda place: (values[place], -place))
        if best == len(values) - 1:
            keep_as_best(
                self.run, self.save, step=state.global_step, metric=self.metric, value=self.sign * values[best]
            )
        if self.patience is not None and len(values) - 1 - best >= self.patience:
            control.should_training_stop = True


def keep_as_best(run: RunFolder, save: Callable[[Path], None], *, step: int, metric: str, value: float) -> None:
    """Replace the best weights, called in every process; a kill leaves the old ones or the new ones."""
    part = run.path / "best.part"
    if is_main():
        shutil.rmtree(part, ignore_errors=True)
    save(part)
    if not is_main():
        return
    write_json(part / "best.json", {"step": step, "metric": metric, "value": value})
    shutil.rmtree(run.best, ignore_errors=True)
    part.rename(run.best)


def best_step(run: RunFolder) -> int | None:
    """The step of the best weights, where there are any."""
    file = run.best / "best.json"
    return int(read_json(file)["step"]) if file.is_file() else None


def train_to_the_end(trainer: Trainer, run: RunFolder, callbacks: list[TrainerCallback]) -> None:
    """Train from the last complete checkpoint, or from the beginning."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    with main_first():
        checkpoint = run.last_checkpoint()
        if is_main():
            run.rewind_metrics(0 if checkpoint is None else checkpoint_step(checkpoint))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def write_result(
    run: RunFolder, name: str, save: Callable[[Path], None], tokenizer: PreTrainedTokenizerBase, *, use_best: bool
) -> Path:
    """Write the run's result under `name`, from the best weights or from the current ones, for every process."""
    target, part = run.path / name, run.path / f"{name}.part"
    copy_best = use_best and from_main(run.best.is_dir)
    if is_main():
        for folder in (target, part):
            shutil.rmtree(folder, ignore_errors=True)
    if not copy_best:
        save(part)
    if is_main():
        if copy_best:
            shutil.copytree(run.best, part)
        tokenizer.save_pretrained(part)
        part.rename(target)
    wait_for_all()
    return target
