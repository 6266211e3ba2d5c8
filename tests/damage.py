"""Damage done to single records of a store."""

import sqlite3
from pathlib import Path


def cut_short(store: Path, item: str, table: str = "episodes", key: str = "id", *, length: int = 100) -> None:
    """Leave the first characters of a record in SQLite."""
    db = sqlite3.connect(store)
    db.execute(f"UPDATE {table} SET record = substr(record, 1, ?) WHERE {key} = ?", (length, item))  # noqa: S608
    db.commit()
    db.close()
