"""What the C library does with memory that PyTorch has freed on a CPU."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def keep_freed_memory() -> None:
    """Ask the C library not to hand memory back between steps or batches, where it is glibc.

    A step allocates the same large tensors as the one before; by default each is mapped and zeroed anew. On the
    quickstart's GRPO that is a seventh of the CPU time, for 0.4 to 0.6 GB more resident memory, and a fifth of a
    large batch of the best-of-N server (`docs/benchmarks.md`).
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    if (libc := _glibc()) is not None:
        libc.mallopt(mmap_threshold, most)
        libc.mallopt(trim_threshold, most)


def hand_back_memory() -> None:
    """What was kept for further steps, once there are none."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    with suppress(OSError):  # another C library
        return ctypes.CDLL("libc.so.6")
    return None
