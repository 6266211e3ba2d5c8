"""What surrounds a training stage: quiet libraries, trackers, and plain words when disk or memory is full."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from sotopia_rl.errors import TrainingError
from sotopia_rl.train.config import TrainerSettings
from sotopia_rl.train.folder import RunFolder
from sotopia_rl.train.heap import hand_back_memory, keep_freed_memory
from sotopia_rl.train.loading import device_of
from sotopia_rl.train.publish import check_publishing
from sotopia_rl.train.trackers import tracking

DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@contextmanager
def training_session(run: RunFolder, settings: TrainerSettings) -> Iterator[None]:
    """Keep the libraries' own bars and known noise out, and say what to do when disk or memory is full.

    Raises:
        MissingExtraError: A tracker's package, or the hub's client, is not installed.
        TrainingError: Instead of the libraries' own errors for these two; nothing saved so far is lost.
    """
    check_publishing(settings)
    if device_of(settings).type == "cpu":
        keep_freed_memory()
    bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), tracking(run, settings):
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True` as")  # in checkpoints
            # peft 0.21 asks transformers 5.23 for a property by its old name.
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if _is_out_of_memory(error):
            raise TrainingError(f"{_memory_name(error)} is out of memory; {_smaller(settings)}") from error
        if _is_disk_full(error):
            raise TrainingError(f"{run.path}: the disk is full; make room and resume") from error
        raise
    finally:
        hand_back_memory()
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, which torch has an error for, or of the machine, where its allocator raises RuntimeError."""
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or allocator


def _memory_name(error: BaseException) -> str:
    return "the GPU" if isinstance(error, torch.OutOfMemoryError) else "the machine"


def _smaller(settings: TrainerSettings) -> str:
    """Which settings of this stage to change so that it needs less memory: those it can resume under, then others."""
    known = type(settings).model_fields
    here: list[str] = []
    anew: list[str] = []
    if getattr(settings, "gradient_checkpointing", True) is False:
        here.append("set gradient_checkpointing: true")
    if "accumulation" in known:
        here.append(f"lower batch_size ({settings.batch_size}) and raise accumulation as much")
    else:
        (here if "num_generations" in known else anew).append(f"lower batch_size ({settings.batch_size})")
    anew += [f"lower {name}" for name in ("max_length", "max_prompt_length", "max_completion_length") if name in known]
    if getattr(settings, "quantise", "nf4") == "none" and getattr(settings, "tuning", "lora") == "lora":
        anew.append("set quantise: nf4")
    parts = [f"{' or '.join(here)}, and resume"] if here else []
    return "; or ".join([*parts, f"in a new folder {', '.join(anew)}"])


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(hint in str(error) for hint in ("No space left", "File too large", "file write failed")):
            return True
        error = error.__cause__ or error.__context__
    return False
