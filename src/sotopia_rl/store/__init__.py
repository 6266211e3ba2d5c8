"""Where episodes, ratings, attributions and failures are kept: SQLite by default, Redis, JSONL files.

`open_store` picks the kind from the name it is given; everything else works through `EpisodeStore`.
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
)
from sotopia_rl.store.sqlite import SQLiteStore

__all__ = [
    "EVERYTHING",
    "AttributionKey",
    "EpisodeQuery",
    "EpisodeStore",
    "EpisodeSummary",
    "Original",
    "SQLiteStore",
    "open_store",
]


def open_store(where: str | Path, *, create: bool = True) -> EpisodeStore:
    """Open the store that `where` names.

    Args:
        where: A path that ends in `.db` or `.sqlite` (SQLite).
        create: Refuse a file that does not exist instead of making it.

    Raises:
        StoreError: The name is of no known kind, or the store cannot be opened.
    """
    path = Path(where)
    if path.suffix in (".db", ".sqlite", ".sqlite3"):
        return SQLiteStore(path, create=create)
    raise StoreError(f"{where}: not the name of a store; give FILE.db, FILE.jsonl or redis://HOST:PORT")
