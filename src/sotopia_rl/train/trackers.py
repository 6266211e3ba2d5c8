"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio. Each is an optional package.

All get the same names and numbers as the file, the judge's included. A resumed run goes on in the same curves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from sotopia_rl.episode import sha256_text
from sotopia_rl.errors import MissingExtraError
from sotopia_rl.train.config import TrackerName, TrainerSettings
from sotopia_rl.train.folder import RunFolder, read_json

PROJECT = "sotopia-rl"


class Tracker(Protocol):
    """An open tracker."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run: RunFolder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run wrote beyond its last checkpoint is hidden: a resumed one writes it again
        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, run: RunFolder, first_step: int) -> None:
        import wandb  # noqa: PLC0415

        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", _name(run)),
            id=_id(run),
            resume="allow",
            dir=run.path,
            config=_settings(run),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, run: RunFolder, first_step: int) -> None:
        import trackio  # noqa: PLC0415

        self.run: Any = trackio.init(
            project=PROJECT, name=f"{_name(run)}-{_id(run)[:6]}", resume="allow", config=_settings(run)
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: Mapping[TrackerName, Callable[[RunFolder, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


def check_trackers(settings: TrainerSettings) -> None:
    """Raises MissingExtraError for the first tracker whose package is not installed."""
    for name in settings.trackers:
        if find_spec(name) is None:
            raise MissingExtraError(name, name)


@contextmanager
def tracking(run: RunFolder, settings: TrainerSettings) -> Iterator[None]:
    """Hand every line of metrics to the trackers too; each is opened by the first line.

    Raises:
        MissingExtraError: A tracker's package is not installed.
    """
    check_trackers(settings)
    opened: dict[TrackerName, Tracker] = {}

    def log(step: int, values: Mapping[str, object]) -> None:
        for name in settings.trackers:
            if name not in opened:
                opened[name] = TRACKERS[name](run, step)
            opened[name].log(step, numbers_of(values))

    run.listeners.append(log)
    try:
        yield
    finally:
        run.listeners.remove(log)
        for tracker in opened.values():
            tracker.close()


def numbers_of(values: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers among a line's values."""
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def _name(run: RunFolder) -> str:
    path = run.path.resolve()
    return f"{path.parent.name}-{path.name}"


def _id(run: RunFolder) -> str:
    """The same for a run and its resumed continuation, another one for a run elsewhere or anew."""
    return sha256_text(f"{run.path.resolve()} {run.settings_file.stat().st_mtime_ns}")[:16]


def _settings(run: RunFolder) -> dict[str, Any]:
    return dict(read_json(run.settings_file))
