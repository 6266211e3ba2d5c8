"""Files that are either whole or absent, also after a kill, and errors that name them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from sotopia_rl.errors import DataError


def write_lines(path: Path, pieces: Iterable[str]) -> int:
    """Write pieces of text one after the other; how many there were.

    Raises:
        DataError: The file cannot be written; what stood there before still does.
    """
    part = path.with_name(path.name + ".part")
    count = 0
    try:
        with part.open("w", encoding="utf-8") as file:
            for piece in pieces:
                file.write(piece)
                count += 1
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error
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
