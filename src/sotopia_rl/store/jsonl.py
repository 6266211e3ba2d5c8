"""Our records as lines of JSON: the form to move whole stores in, and to read with other tools.

The first line is a header, `{"kind": "header", "format": "sotopia-rl", "schema_version": 1}`; every other line is
`{"kind": K, "record": {...}}`, K one of `KINDS`. A later line replaces an earlier one of the same key. Two files may be
joined with `cat`. SOTOPIA's own lines are another form: see `sotopia_read.py`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import ValidationError

from sotopia_rl.episode import SCHEMA_VERSION, Attribution, Episode, Failure, Rating, Record
from sotopia_rl.errors import DataError, StoreError
from sotopia_rl.files import json_fault
from sotopia_rl.store.interface import Original

logger = logging.getLogger(__name__)

FORMAT = "sotopia-rl"

Torn = Literal["refuse", "skip"]
"""What to do about a last line that was being written when its writer died."""


class StageFailure(Record):
    """A failure with the stage and the item it belongs to."""

    stage: str
    item_id: str
    failure: Failure


class Deletion(Record):
    """Takes back an earlier line of this kind and key."""

    what: Literal["episode", "failure"]
    key: tuple[str, ...]


KINDS: dict[str, type[Record]] = {
    "episode": Episode,
    "rating": Rating,
    "attribution": Attribution,
    "failure": StageFailure,
    "original": Original,
    "deletion": Deletion,
}
_KIND_OF = {cls: kind for kind, cls in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, parsed. `number` counts from 1; `offset` is in bytes."""

    number: int
    offset: int
    data: dict[str, Any]


def read_json_lines(path: Path, *, torn: Torn = "refuse") -> Iterator[Line]:
    """The JSON objects of a file, one a line, streaming.

    Args:
        torn: With `skip`, a half-written last line is logged as a warning and left out.

    Raises:
        DataError: The file cannot be read, or a line is no JSON object; names the line.
    """
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    data = _json_object(path, number, line, torn=torn)
                    if data is None:
                        return
                    yield Line(number, offset, data)
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _json_object(path: Path, number: int, line: bytes, *, torn: Torn) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except ValueError as error:
        if line.endswith(b"\n"):
            raise DataError(f"{path}:{number}: not JSON ({json_fault(error)}); mend or remove the line") from error
        if torn == "refuse":
            raise DataError(
                f"{path}:{number}: the last line is half-written; remove it, or skip it with --skip-torn-line"
            ) from error
        logger.warning("%s:%d: the last line is half-written and is left out", path, number)
        return None
    if not isinstance(data, dict):
        raise DataError(f"{path}:{number}: expected a JSON object, found {type(data).__name__}")
    return data


def read_records(path: Path, *, torn: Torn = "refuse") -> Iterator[tuple[Line, Record]]:
    """The records of a file in our form, header lines left out.

    Raises:
        DataError: As `read_json_lines`, or a line is no record of ours.
        StoreError: The file is of another schema version.
    """
    for line in read_json_lines(path, torn=torn):
        if line.data.get("kind") == "header":
            _check_header(path, line)
        elif line.number == 1:
            raise DataError(
                f"{path}:1: no sotopia-rl header; `sotopia-rl episodes import` also reads sotopia's own form"
            )
        else:
            yield line, parse_record(path, line)


def _check_header(path: Path, line: Line) -> None:
    if line.data.get("format") != FORMAT:
        raise DataError(f"{path}:{line.number}: a header of {line.data.get('format')!r}, not of {FORMAT!r}")
    version = line.data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{path}:{line.number}: written with schema version {version}, this sotopia-rl reads version "
            f"{SCHEMA_VERSION}; read it with the sotopia-rl that wrote it"
        )


def parse_record(path: Path, line: Line) -> Record:
    """The record on a line.

    Raises:
        DataError: Its kind is unknown, or it is not a record of that kind.
    """
    cls = KINDS.get(str(line.data.get("kind")))
    if cls is None:
        raise DataError(f"{path}:{line.number}: kind {line.data.get('kind')!r}; expected one of {', '.join(KINDS)}")
    try:
        return cls.model_validate(line.data.get("record"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "record"
        raise DataError(f"{path}:{line.number}: not a valid {line.data['kind']} ({place}: {first['msg']})") from error


class JsonlWriter:
    """Appends records to a file, each line whole or not at all.

    A half-written last line, left by a writer that died, is cut off first (with a warning). `start` empties the file.

    Raises:
        StoreError: The file cannot be opened or written.
    """

    def __init__(self, path: Path, *, start: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w+b" if start or not path.exists() else "r+b", buffering=0)
            self._end = _end_of_whole_lines(path, self._file)
        except OSError as error:
            raise self._told(error) from error
        if self._end == 0:
            self._write(json.dumps({"kind": "header", "format": FORMAT, "schema_version": SCHEMA_VERSION}))

    def write(self, record: Record) -> int:
        """Append one record; the offset of its line."""
        return self._write(f'{{"kind": "{_KIND_OF[type(record)]}", "record": {record.model_dump_json()}}}')

    def _write(self, text: str) -> int:
        line = text.encode() + b"\n"
        start = self._end
        try:
            self._file.seek(start)
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(start)  # what fitted of the line
            raise self._told(error) from error
        self._end += len(line)
        return start

    def _told(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self.path}: cannot be written ({error.strerror}); what was written before is kept. "
            "Free some space or give another path, and run again"
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_BLOCK_BYTES = 1 << 16


def _end_of_whole_lines(path: Path, file: FileIO) -> int:
    """Size of the file after a torn tail is cut off."""
    size = file.seek(0, os.SEEK_END)
    tail, start = b"", size
    while start > 0 and b"\n" not in tail:
        start = max(0, start - _BLOCK_BYTES)
        file.seek(start)
        tail = file.read(size - start)
    end = start + tail.rfind(b"\n") + 1
    if end == size:
        return size
    try:
        json.loads(tail[end - start :])
    except ValueError:
        logger.warning("%s: its half-written last line is cut off", path)
        file.truncate(end)
        return end
    file.seek(size)
    file.write(b"\n")  # whole, but for its end
    return size + 1
