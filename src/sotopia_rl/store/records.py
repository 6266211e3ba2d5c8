"""Records as a store keeps them: read back from their text, and written many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from pydantic import ValidationError

from sotopia_rl.episode import Record
from sotopia_rl.errors import DamagedRecordError

BATCH = 200
"""Records read, or written, at once: some megabytes of episodes."""

R = TypeVar("R", bound=Record)
T = TypeVar("T")


def read_record(cls: type[R], text: str, *, where: object, what: str) -> R:
    """The record that `text` holds.

    Raises:
        DamagedRecordError: It is no record of that class; names the store and what was to be read.
    """
    try:
        return cls.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "record"
        raise DamagedRecordError(where, what, f"{place}: {first['msg']}") from error


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Up to `BATCH` of them at a time."""
    source = iter(items)
    while batch := list(islice(source, BATCH)):
        yield batch
