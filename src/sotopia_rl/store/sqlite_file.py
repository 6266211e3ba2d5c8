"""The SQLite file of a store: opened or made, shared by processes, written in transactions, its errors told in words.

Write-ahead logging, a busy timeout and short transactions; readers never block a writer. A killed process
leaves the last committed transaction. `synchronous=NORMAL`: a power cut may undo the newest commits but
cannot damage the file; a killed process loses nothing.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sotopia_rl.episode import SCHEMA_VERSION
from sotopia_rl.errors import StoreError

APPLICATION_ID = 0x536F524C
"""Marks the file as ours, in SQLite's own header field ("SoRL")."""

BUSY_SECONDS = 60.0

SUMMARY_COLUMNS = "id, tag, scenario_id, codename, model0, model1, status, num_turns, failure_kind"
"""Of a listing, in the order of `EpisodeSummary`."""

# The index covers them, so that a listing never touches the pages that hold the conversations.
_TABLES = f"""
CREATE TABLE episodes (
    id TEXT PRIMARY KEY, tag TEXT NOT NULL, scenario_id TEXT NOT NULL, codename TEXT NOT NULL,
    model0 TEXT NOT NULL, model1 TEXT NOT NULL, status TEXT NOT NULL, num_turns INTEGER NOT NULL,
    failure_kind TEXT, conversation TEXT NOT NULL, record TEXT NOT NULL);
CREATE INDEX episodes_summary ON episodes (tag, {SUMMARY_COLUMNS.replace("tag, ", "")});
CREATE TABLE ratings (
    episode_id TEXT NOT NULL, judge TEXT NOT NULL, record TEXT NOT NULL,
    PRIMARY KEY (episode_id, judge));
CREATE TABLE attributions (
    episode_id TEXT NOT NULL, seat INTEGER NOT NULL, dimension TEXT NOT NULL, method TEXT NOT NULL,
    annotator TEXT NOT NULL, record TEXT NOT NULL,
    PRIMARY KEY (episode_id, seat, dimension, method, annotator));
CREATE TABLE failures (
    stage TEXT NOT NULL, item_id TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (stage, item_id));
CREATE TABLE originals (episode_id TEXT PRIMARY KEY, record TEXT NOT NULL);
"""


class DatabaseFile:
    """One open file with the tables of a store; all of a process's threads may use it.

    Arguments and errors are those of `SQLiteStore`.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self._lock = threading.RLock()
        _check_place(path, create=create)
        with self._errors_told():
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            with self._errors_told():
                self._set_up()
        except BaseException:
            self._db.close()
            raise

    def _set_up(self) -> None:
        application_id, version = self._header()
        if (application_id, version) == (0, 0):
            self._create_tables()
        elif application_id != APPLICATION_ID:
            raise StoreError(f"{self.path}: a SQLite database, but not an episode store; give another path")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"{self.path}: written with schema version {version}, this sotopia-rl reads version {SCHEMA_VERSION}; "
                "export it to .jsonl with the sotopia-rl that wrote it, or start a new store"
            )
        self._db.execute("PRAGMA synchronous = NORMAL")

    def _header(self) -> tuple[int, int]:
        (application_id,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        return application_id, version

    def _create_tables(self) -> None:
        _until_free(lambda: self._db.execute("PRAGMA journal_mode = WAL").fetchone())
        with self.writing() as db:
            if self._header() == (APPLICATION_ID, SCHEMA_VERSION):
                return  # another process was first
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                raise StoreError(f"{self.path}: a SQLite database, but not an episode store; give another path")
            for statement in _TABLES.strip().split(";\n"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {_told(error)}") from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, undone whole where anything in it fails."""
        with self._lock, self._errors_told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors have rolled back already
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self._lock, self._errors_told():
            return self._db.execute(sql, values).fetchall()

    def close(self) -> None:
        with self._lock, self._errors_told():
            self._db.close()


def _check_place(path: Path, *, create: bool) -> None:
    if path.is_dir():
        raise StoreError(f"{path}: a folder, not a store; give a file such as {path / 'episodes.db'}")
    if path.exists():
        return
    if not create:
        raise StoreError(f"{path}: no such store; check the path, or make one with `sotopia-rl simulate`")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: its folder cannot be made ({error.strerror}); give another path") from error


def _told(error: sqlite3.Error) -> str:
    """What went wrong in words, with what to do."""
    name = getattr(error, "sqlite_errorname", "")
    advice = {
        "SQLITE_NOTADB": "not a database; check the path, or move the file away to start a new store",
        "SQLITE_CORRUPT": f"damaged ({error}); copy it and try `sqlite3 FILE .recover`, or import its last export",
        "SQLITE_CANTOPEN": "cannot be opened; check that the folder exists and may be written to",
        "SQLITE_READONLY": "not writable; check the permissions of the file and its folder",
        "SQLITE_BUSY": f"another process held it for {BUSY_SECONDS:.0f} s; run again when that one is done",
        "SQLITE_FULL": "no room left to write; what was stored before is kept. Free some space and run again",
        "SQLITE_IOERR": f"cannot be read or written ({error}): the disk is full, at a size limit, or failing; "
        "what was stored before is kept. Free some space and run again",
    }
    return next((text for prefix, text in advice.items() if name.startswith(prefix)), f"database error: {error}")


def _until_free(step: Callable[[], object]) -> None:
    """Run `step` until no other process is in its way: SQLite does not wait by itself to change the journal mode."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            step()
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
