"""What several training processes (torchrun, accelerate launch) must agree on: who writes, who waits, whose GPU.

Without a launcher there is one process, which is the main one, and nobody to wait for. Files are written by the main
process alone; the others wait and read. Who is who stands in the launcher's environment, so that torch comes in only
where processes have to meet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another: longer than the main one may need for a held-out evaluation."""


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes files, logs and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def number_on_machine() -> int:
    """The number of this process among those of its machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def weights_are_divided() -> bool:
    """Whether the launcher asks for FSDP or ZeRO-3, which place the weights themselves."""
    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or zero3


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        _meet().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the block, then the others. Where it fails, the launcher ends the others."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives in the main process, in all of them; only that one does it."""
    found = [work() if is_main() else None]
    if count() > 1:
        _meet()
        import torch

        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]  # None only until it is broadcast


def _meet() -> Any:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
