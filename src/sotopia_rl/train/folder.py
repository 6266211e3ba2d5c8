"""The folder of one training run: what it was asked to do, how far it is, what it made. No torch here.

settings.json   stage, settings and fingerprints of the inputs; a run resumes only under the same
metrics.jsonl   one line per logged step
tensorboard/    the same for TensorBoard, where it is among the trackers
checkpoints/    checkpoint-N; one is complete once its COMPLETE file stands
best/           the best adapter so far, where one is kept
adapter/        the result
finished.json   stands once the run is over
published.json  stands once the result is on the hub, where it is to be
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sotopia_rl import __version__
from sotopia_rl.config import Config
from sotopia_rl.errors import ConfigError, DataError, TrainingError
from sotopia_rl.files import written_whole
from sotopia_rl.train.processes import is_main, main_first, wait_for_all

COMPLETE = "COMPLETE"
FREE = (
    "trackers",
    "push_to_hub",
    "gradient_checkpointing",
    "vllm_urls",
    "vllm_adapter_folder",
    "vllm_timeout_seconds",
    "vllm_retries",
    "vllm_memory_share",
    "vllm_sleep",
)
"""Settings that change nothing about the result, so that a run may go on, or be published, under others."""


@dataclass(frozen=True)
class RunFolder:
    """A claimed run folder.

    Attributes:
        listeners: Called with every line of metrics: its step and its values.
    """

    path: Path
    listeners: list[Callable[[int, Mapping[str, object]], None]] = field(default_factory=list, compare=False)

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def started(self) -> bool:
        """Whether there is anything to lose; a run that was refused before its first step may be asked anew."""
        return self.settings_file.is_file() and (self.finished or self.metrics_file.is_file())

    @property
    def finished_file(self) -> Path:
        return self.path / "finished.json"

    @property
    def finished(self) -> bool:
        return self.finished_file.is_file()

    def finish(self, facts: Mapping[str, object]) -> None:
        """Mark the run as over, for every process."""
        if is_main():
            write_json(self.finished_file, facts)
        wait_for_all()

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; those torn by a kill are removed on the way."""
        newest: Path | None = None
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=checkpoint_step):
            if (folder / COMPLETE).is_file():
                newest = folder
            else:
                shutil.rmtree(folder)
        return newest

    def prune_checkpoints(self, keep: int = 1) -> None:
        """Remove all but the newest complete checkpoints."""
        complete = [f for f in self.checkpoints.glob("checkpoint-*") if (f / COMPLETE).is_file()]
        for folder in sorted(complete, key=checkpoint_step)[:-keep]:
            (folder / COMPLETE).unlink()
            shutil.rmtree(folder)

    def rewind_metrics(self, step: int) -> None:
        """Drop metric lines after `step`: a resumed run writes them again."""
        if self.metrics_file.is_file():
            kept = [line for line in read_metrics(self.metrics_file) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_text(self.metrics_file, text)

    def append_metrics(self, step: int, values: Mapping[str, object]) -> None:
        """Add one line to the metrics, in the main process; numbers that are not finite become null."""
        if not is_main():
            return
        line = {"step": step, **{name: finite(value) for name, value in values.items()}}
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for listener in self.listeners:
            listener(step, values)


def claim(path: Path, stage: str, settings: Config, inputs: Mapping[str, str], *, resume: bool) -> RunFolder:
    """Open `path` for a run of `stage`, or find out that it holds another one.

    Args:
        inputs: Fingerprints of what the run reads, by name.
        resume: Go on with an unfinished run; a folder without one starts from the beginning.

    Raises:
        ConfigError: The folder holds a run with other settings or inputs; the message names them.
        TrainingError: It holds an unfinished run and `resume` is off.
    """
    asked: dict[str, Any] = {
        "stage": stage,
        "settings": settings.model_dump(mode="json"),
        "inputs": dict(inputs),
        "package_version": __version__,
    }
    run = RunFolder(path)
    with main_first():
        if is_main():
            _claim(run, asked, resume=resume)
    return run


def _claim(run: RunFolder, asked: Mapping[str, Any], *, resume: bool) -> None:
    if run.started:
        if changes := differences(_binding(read_json(run.settings_file)), _binding(asked)):
            raise ConfigError(f"{run.path}: holds a run with other settings: {'; '.join(changes)}; use another folder")
        if not run.finished and not resume:
            raise TrainingError(f"{run.path}: holds an unfinished run; resume it, or remove the folder")
        return
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(run.settings_file, asked)


def _binding(claimed: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's settings file holds, without what may change."""
    settings = {name: value for name, value in claimed["settings"].items() if name not in FREE}
    if "num_generations" in settings:
        del settings["batch_size"]  # a step's completions are so many per prompt, however they are divided
    elif "accumulation" in settings and settings.get("loss") != "mse_ranking":
        settings["batch_size x accumulation"] = settings.pop("batch_size") * settings.pop("accumulation")
    return {**claimed, "settings": settings}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two nested mappings differ, one phrase per leaf."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        nested = [differences(old.get(k), new.get(k), f"{name}.{k}" if name else str(k)) for k in keys]
        return [phrase for phrases in nested for phrase in phrases]
    if old == new:
        return []
    if name.startswith("inputs.") and old is not None and new is not None:  # hashes, which tell a reader nothing
        return [f"{name.removeprefix('inputs.')} is not what it was"]
    return [f"{name} was {_short(old)}, now {_short(new)}"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fingerprints(**paths: Path | None) -> dict[str, str]:
    """Hashes of a run's inputs by name; those that are None are left out."""
    return {name: fingerprint(path) for name, path in paths.items() if path is not None}


def fingerprint(path: Path) -> str:
    """A hash of a file, or of a model folder.

    Of a folder's weights only the sizes and first and last mebibyte are read: hashing tens of gigabytes
    would take longer than it saves.

    Raises:
        DataError: There is nothing at `path`.
    """
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    elif path.is_dir():
        for file_path in sorted(p for p in path.iterdir() if p.suffix in {".json", ".jinja", ".safetensors"}):
            digest.update(file_path.name.encode() + str(file_path.stat().st_size).encode())
            digest.update(_ends(file_path))
    else:
        raise DataError(f"{path}: no such file or folder")
    return digest.hexdigest()[:16]


def _ends(path: Path, size: int = 1 << 20) -> bytes:
    with path.open("rb") as file:
        start = file.read(size)
        file.seek(max(0, path.stat().st_size - size))
        return start + file.read(size)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.rpartition("-")[2])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line torn by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def finite(value: object) -> object:
    """`value`, or None where it is a float that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Raises DataError where the file is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def write_json(path: Path, value: object) -> None:
    """Write JSON that is either whole or absent, also after a kill."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either whole or absent, also after a kill. OSError is for `session.py` to explain."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
