"""The default store: one SQLite file, safe with several processes at once.

Write-ahead logging, a busy timeout and short transactions; readers never block a writer. A killed process
leaves the last committed transaction. `synchronous=NORMAL`: a power cut may undo the newest commits but
cannot damage the file; a killed process loses nothing.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import ValidationError

from sotopia_rl.episode import SCHEMA_VERSION, Attribution, Episode, Failure, Rating, Record
from sotopia_rl.errors import DamagedRecordError, StoreError
from sotopia_rl.store.interface import (
    EVERYTHING,
    AttributionKey,
    EpisodeQuery,
    EpisodeSummary,
    Original,
    conversation_sha256,
    episode_of,
)

APPLICATION_ID = 0x536F524C
"""Marks the file as ours, in SQLite's own header field ("SoRL")."""

BUSY_SECONDS = 60.0
PAGE_ROWS = 200
"""Rows read, or written, per transaction: some megabytes of episodes."""

_SUMMARY = "id, tag, scenario_id, codename, model0, model1, status, num_turns, failure_kind"

# The index covers `_SUMMARY`, so that a listing never touches the pages that hold the conversations.
_TABLES = f"""
CREATE TABLE episodes (
    id TEXT PRIMARY KEY, tag TEXT NOT NULL, scenario_id TEXT NOT NULL, codename TEXT NOT NULL,
    model0 TEXT NOT NULL, model1 TEXT NOT NULL, status TEXT NOT NULL, num_turns INTEGER NOT NULL,
    failure_kind TEXT, conversation TEXT NOT NULL, record TEXT NOT NULL);
CREATE INDEX episodes_summary ON episodes (tag, {_SUMMARY.replace("tag, ", "")});
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

R = TypeVar("R", bound=Record)
T = TypeVar("T")


class SQLiteStore:
    """An `EpisodeStore` in one file (with `-wal` and `-shm` beside it while open).

    Args:
        path: The file; made, with its folder, where it does not exist.
        create: Refuse a missing file instead of making it.

    Raises:
        StoreError: The file is missing, not writable, not a database, damaged, or of another version.
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
        with self._writing() as db:
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
    def _writing(self) -> Iterator[sqlite3.Connection]:
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

    def _rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._errors_told():
            return self._db.execute(sql, values).fetchall()

    def _read(self, cls: type[R], text: str, what: str) -> R:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "record"
            raise DamagedRecordError(self.path, what, f"{place}: {first['msg']}") from error

    # Episodes

    def add_episode(self, episode: Episode) -> None:
        self.add_episodes((episode,))

    def add_episodes(self, episodes: Iterable[Episode]) -> int:
        written = 0
        for batch in _batches(episodes):
            rows = [_episode_row(episode) for episode in batch]  # outside the transaction: it is the slow part
            with self._writing() as db:
                for row in rows:
                    _drop_stale(db, row["id"], row["conversation"])
                columns = ", ".join(rows[0])
                marks = ", ".join(f":{column}" for column in rows[0])
                db.executemany(f"INSERT OR REPLACE INTO episodes ({columns}) VALUES ({marks})", rows)  # noqa: S608
            written += len(rows)
        return written

    def episode(self, episode_id: str) -> Episode:
        rows = self._rows("SELECT record FROM episodes WHERE id = ?", (episode_id,))
        if not rows:
            raise StoreError(f"{self.path}: no episode {episode_id}; `sotopia-rl episodes list` shows what there is")
        return self._read(Episode, rows[0][0], f"episode {episode_id}")

    def episodes(self, query: EpisodeQuery = EVERYTHING) -> Iterator[Episode]:
        for episode_id, record in self._pages("id, record", query):
            yield self._read(Episode, record, f"episode {episode_id}")

    def summaries(self, query: EpisodeQuery = EVERYTHING) -> Iterator[EpisodeSummary]:
        return map(EpisodeSummary._make, self._listed(_SUMMARY, query))

    def ids(self, query: EpisodeQuery = EVERYTHING) -> list[str]:
        return [episode_id for (episode_id,) in self._listed("id", query)]

    def _listed(self, columns: str, query: EpisodeQuery) -> list[tuple[Any, ...]]:
        """Short columns of the chosen episodes, by id, read from the index alone."""
        where, values = _where(query)
        limit = -1 if query.limit is None else query.limit
        # Sorted by `+id`, an expression, or SQLite would rather walk the table in order of ids.
        order = "id" if query.tag is not None else "+id"
        sql = f"SELECT {columns} FROM episodes INDEXED BY episodes_summary WHERE {where} ORDER BY {order} LIMIT ?"  # noqa: S608
        return self._rows(sql, (*values, limit))

    def count(self, query: EpisodeQuery = EVERYTHING) -> int:
        where, values = _where(query)
        ((total,),) = self._rows(f"SELECT count(*) FROM episodes WHERE {where}", values)  # noqa: S608
        return int(total) if query.limit is None else min(int(total), query.limit)

    def tags(self) -> dict[str, int]:
        return dict(self._rows("SELECT tag, count(*) FROM episodes GROUP BY tag ORDER BY tag"))

    def delete_episodes(self, ids: Iterable[str]) -> int:
        deleted = 0
        for batch in _batches(ids):
            with self._writing() as db:
                failed = db.execute("SELECT stage, item_id FROM failures").fetchall()
                theirs = [key for key in failed if episode_of(key[1]) in batch]
                db.executemany("DELETE FROM failures WHERE stage = ? AND item_id = ?", theirs)
                for episode_id in batch:
                    deleted += db.execute("DELETE FROM episodes WHERE id = ?", (episode_id,)).rowcount
                    for table in ("ratings", "attributions", "originals"):
                        db.execute(f"DELETE FROM {table} WHERE episode_id = ?", (episode_id,))  # noqa: S608
        return deleted

    def _pages(self, columns: str, query: EpisodeQuery) -> Iterator[tuple[Any, ...]]:
        """Rows by id, the first column; each page is a query of its own, so nothing stays locked."""
        where, values = _where(query)
        sql = f"SELECT {columns} FROM episodes WHERE {where} AND id > ? ORDER BY id LIMIT ?"  # noqa: S608
        last, left = "", query.limit
        while left is None or left > 0:
            page = self._rows(sql, (*values, last, PAGE_ROWS if left is None else min(left, PAGE_ROWS)))
            yield from page
            if len(page) < PAGE_ROWS:
                return
            last, left = page[-1][0], None if left is None else left - len(page)

    # Ratings

    def add_rating(self, rating: Rating) -> None:
        self.add_ratings((rating,))

    def add_ratings(self, ratings: Iterable[Rating]) -> int:
        rows = ((r.episode_id, r.judge, r.model_dump_json()) for r in ratings)
        return self._insert("ratings", rows)

    def ratings(self, episode_id: str | None = None, *, judge: str | None = None) -> Iterator[Rating]:
        where = {"episode_id": episode_id, "judge": judge}
        for *key, record in self._keyed("ratings", ("episode_id", "judge"), where):
            yield self._read(Rating, record, f"rating {key}")

    def rated(self, query: EpisodeQuery = EVERYTHING, *, judge: str | None = None) -> Iterator[tuple[Episode, Rating]]:
        for episode in self.episodes(query):
            for rating in self.ratings(episode.id, judge=judge):
                yield episode, rating

    def rated_ids(self, judge: str) -> set[str]:
        return {row[0] for row in self._rows("SELECT episode_id FROM ratings WHERE judge = ?", (judge,))}

    def judges(self) -> dict[str, int]:
        return dict(self._rows("SELECT judge, count(*) FROM ratings GROUP BY judge ORDER BY judge"))

    # Attributions

    def add_attribution(self, attribution: Attribution) -> None:
        self.add_attributions((attribution,))

    def add_attributions(self, attributions: Iterable[Attribution]) -> int:
        rows = ((a.episode_id, a.seat, a.dimension, a.method, a.annotator, a.model_dump_json()) for a in attributions)
        return self._insert("attributions", rows)

    def attributions(
        self, episode_id: str | None = None, *, method: str | None = None, annotator: str | None = None
    ) -> Iterator[Attribution]:
        where = {"episode_id": episode_id, "method": method, "annotator": annotator}
        columns = ("episode_id", "seat", "dimension", "method", "annotator")
        for *key, record in self._keyed("attributions", columns, where):
            yield self._read(Attribution, record, f"attribution {key}")

    def attributed(self, *, method: str, annotator: str) -> set[AttributionKey]:
        sql = "SELECT episode_id, seat, dimension FROM attributions WHERE method = ? AND annotator = ?"
        return {(row[0], row[1], row[2]) for row in self._rows(sql, (method, annotator))}

    # Failures

    def add_failure(self, stage: str, item_id: str, failure: Failure) -> None:
        self._insert("failures", ((stage, item_id, failure.model_dump_json()),))

    def failures(self, stage: str | None = None) -> Iterator[tuple[str, str, Failure]]:
        for found, item_id, record in self._keyed("failures", ("stage", "item_id"), {"stage": stage}):
            yield found, item_id, self._read(Failure, record, f"failure of {item_id} in {found}")

    def delete_failures(self, stage: str, item_ids: Iterable[str] | None = None) -> int:
        with self._writing() as db:
            if item_ids is None:
                return db.execute("DELETE FROM failures WHERE stage = ?", (stage,)).rowcount
            sql = "DELETE FROM failures WHERE stage = ? AND item_id = ?"
            return sum(db.execute(sql, (stage, item_id)).rowcount for item_id in item_ids)

    # Originals

    def add_original(self, original: Original) -> None:
        self._insert("originals", ((original.episode_id, original.model_dump_json()),))

    def original(self, episode_id: str) -> Original | None:
        rows = self._rows("SELECT record FROM originals WHERE episode_id = ?", (episode_id,))
        return self._read(Original, rows[0][0], f"original of {episode_id}") if rows else None

    # Shared

    def _insert(self, table: str, rows: Iterable[tuple[object, ...]]) -> int:
        written = 0
        for batch in _batches(rows):
            marks = ", ".join("?" * len(batch[0]))
            with self._writing() as db:
                db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", batch)  # noqa: S608
            written += len(batch)
        return written

    def _keyed(self, table: str, columns: tuple[str, ...], where: dict[str, str | None]) -> Iterator[tuple[Any, ...]]:
        """Key columns and record of each row, in key order, page by page."""
        given = {column: value for column, value in where.items() if value is not None}
        names = ", ".join(columns)
        conditions = "".join(f" AND {column} = ?" for column in given)
        first: tuple[object, ...] = ("",) + (-1,) * (len(columns) - 1)
        while True:
            sql = (
                f"SELECT {names}, record FROM {table} WHERE ({names}) > ({', '.join('?' * len(columns))})"  # noqa: S608
                f"{conditions} ORDER BY {names} LIMIT {PAGE_ROWS}"
            )
            page = self._rows(sql, (*first, *given.values()))
            yield from page
            if len(page) < PAGE_ROWS:
                return
            first = page[-1][:-1]

    def close(self) -> None:
        with self._lock, self._errors_told():
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _until_free(step: Any) -> None:
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


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    source = iter(items)
    while batch := list(islice(source, PAGE_ROWS)):
        yield batch


def _episode_row(episode: Episode) -> dict[str, object]:
    summary = EpisodeSummary.of(episode)
    return {
        **summary._asdict(),
        "conversation": conversation_sha256(episode),
        "record": episode.model_dump_json(),
    }


def _drop_stale(db: sqlite3.Connection, episode_id: object, conversation: object) -> None:
    """Remove what was said about another conversation of the same id."""
    rows = db.execute("SELECT conversation FROM episodes WHERE id = ?", (episode_id,)).fetchall()
    if rows and rows[0][0] != conversation:
        for table in ("ratings", "attributions", "originals"):
            db.execute(f"DELETE FROM {table} WHERE episode_id = ?", (episode_id,))  # noqa: S608


def _where(query: EpisodeQuery) -> tuple[str, list[object]]:
    """SQL condition and its values."""
    equal = {"tag": query.tag, "scenario_id": query.scenario_id, "codename": query.codename, "status": query.status}
    conditions = ["1"] + [f"{column} = ?" for column, value in equal.items() if value is not None]
    values: list[object] = [value for value in equal.values() if value is not None]
    if query.model is not None:
        conditions.append("? IN (model0, model1)")
        values.append(query.model)
    return " AND ".join(conditions), values
