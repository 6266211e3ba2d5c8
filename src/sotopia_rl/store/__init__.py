"""Where episodes, ratings, attributions and failures are kept: SQLite by default, Redis, JSONL files.

`open_store` picks the kind from the name it is given; everything else works through `EpisodeStore`. `transfer.py` has
import and export.
"""

from __future__ import annotations

from pathlib import Path

from sotopia_rl.errors import StoreError
from sotopia_rl.store.interface import (
    EVERYTHING,
    AttributionKey,
    EpisodeQuery,
    EpisodeStore,
    EpisodeSummary,
    Original,
    refuse_empty,
)
from sotopia_rl.store.jsonl_store import JsonlStore
from sotopia_rl.store.sqlite import SQLiteStore
from sotopia_rl.store.transfer import TransferReport, copy, export_file, import_file

__all__ = [
    "EVERYTHING",
    "AttributionKey",
    "EpisodeQuery",
    "EpisodeStore",
    "EpisodeSummary",
    "JsonlStore",
    "Original",
    "SQLiteStore",
    "TransferReport",
    "copy",
    "export_file",
    "import_file",
    "open_store",
    "refuse_empty",
]

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def open_store(where: str | Path, *, create: bool = True) -> EpisodeStore:
    """Open the store that `where` names.

    Args:
        where: A path that ends in `.db`, `.sqlite` (SQLite) or `.jsonl` (a file of our lines); `redis://HOST:PORT`,
            or bare `redis` for the one in `REDIS_OM_URL`.
        create: Refuse a file that does not exist instead of making it.

    Raises:
        StoreError: The name is of no known kind, or the store cannot be opened.
        DataError: A JSONL file holds something else.
        MissingExtraError: Redis is asked for, and its client is not installed.
    """
    name = str(where)
    if name == "redis" or name.startswith(REDIS_SCHEMES):
        from sotopia_rl.store.redis import RedisStore  # noqa: PLC0415 - an extra

        return RedisStore(name)
    path = Path(where)
    if path.suffix in (".db", ".sqlite", ".sqlite3"):
        return SQLiteStore(path, create=create)
    if path.suffix == ".jsonl":
        return JsonlStore(path, create=create)
    raise StoreError(f"{where}: not the name of a store; give FILE.db, FILE.jsonl or redis://HOST:PORT")
