"""Files that are either whole or absent, also after a kill, and errors that name them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sotopia_rl.errors import DataError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its place when it is whole, and goes away if it never is. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """A place for files that belong together: they go into `folder`, which is made, when all of them are whole.

    Raises:
        DataError: The folder cannot be written to.
    """
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for file in sorted(part.iterdir()):
            file.replace(folder / file.name)
    except OSError as error:
        raise DataError(not_written(folder, error)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def not_written(path: Path, error: OSError) -> str:
    """What to tell of a file that could not be written."""
    return f"{path}: cannot be written ({error.strerror}); free some space or give another path, and run again"


def write_lines(path: Path, pieces: Iterable[str]) -> int:
    """Write pieces of text one after the other; how many there were.

    Raises:
        DataError: The file cannot be written; what stood there before still does.
    """
    count = 0
    try:
        with written_whole(path) as part, part.open("w", encoding="utf-8") as file:
            for piece in pieces:
                file.write(piece)
                count += 1
    except OSError as error:
        raise DataError(not_written(path, error)) from error
    return count


def write_text(path: Path, text: str) -> None:
    """Write a text file. Raises DataError as `write_lines`."""
    write_lines(path, (text,))


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        DataError: It is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error


def json_fault(error: ValueError) -> str:
    """Why a line of a file is not JSON. json's own line and column count from that line's start, and mislead."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
