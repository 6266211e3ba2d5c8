"""The default store: one SQLite file, safe with several processes at once.

How the file is opened, shared and written to is in `sqlite_file.py`; here are the records in its tables.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sotopia_rl.episode import Attribution, Episode, Failure, Rating
from sotopia_rl.errors import StoreError
from sotopia_rl.store.interface import (
    EVERYTHING,
    AttributionKey,
    EpisodeQuery,
    EpisodeStore,
    EpisodeSummary,
    Original,
    conversation_sha256,
    episode_of,
)
from sotopia_rl.store.records import BATCH, batches, read_record
from sotopia_rl.store.sqlite_file import SUMMARY_COLUMNS, DatabaseFile


class SQLiteStore(EpisodeStore):
    """An `EpisodeStore` in one file (with `-wal` and `-shm` beside it while open).

    Args:
        path: The file; made, with its folder, where it does not exist.
        create: Refuse a missing file instead of making it.

    Raises:
        StoreError: The file is missing, not writable, not a database, damaged, or of another version.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self._file = DatabaseFile(path, create=create)

    # Episodes

    def add_episodes(self, episodes: Iterable[Episode]) -> int:
        written = 0
        for batch in batches(episodes):
            rows = [_episode_row(episode) for episode in batch]  # outside the transaction: it is the slow part
            with self._file.writing() as db:
                for row in rows:
                    _drop_stale(db, row["id"], row["conversation"])
                columns = ", ".join(rows[0])
                marks = ", ".join(f":{column}" for column in rows[0])
                db.executemany(f"INSERT OR REPLACE INTO episodes ({columns}) VALUES ({marks})", rows)  # noqa: S608
            written += len(rows)
        return written

    def episode(self, episode_id: str) -> Episode:
        rows = self._file.rows("SELECT record FROM episodes WHERE id = ?", (episode_id,))
        if not rows:
            raise StoreError(f"{self.path}: no episode {episode_id}; `sotopia-rl episodes list` shows what there is")
        return read_record(Episode, rows[0][0], where=self.path, what=f"episode {episode_id}")

    def episodes(self, query: EpisodeQuery = EVERYTHING) -> Iterator[Episode]:
        for episode_id, record in self._pages("id, record", query):
            yield read_record(Episode, record, where=self.path, what=f"episode {episode_id}")

    def summaries(self, query: EpisodeQuery = EVERYTHING) -> Iterator[EpisodeSummary]:
        return map(EpisodeSummary._make, self._listed(SUMMARY_COLUMNS, query))

    def ids(self, query: EpisodeQuery = EVERYTHING) -> list[str]:
        return [episode_id for (episode_id,) in self._listed("id", query)]

    def _listed(self, columns: str, query: EpisodeQuery) -> list[tuple[Any, ...]]:
        """Short columns of the chosen episodes, by id, read from the index alone."""
        where, values = _where(query)
        limit = -1 if query.limit is None else query.limit
        # Sorted by `+id`, an expression, or SQLite would rather walk the table in order of ids.
        order = "id" if query.tag is not None else "+id"
        sql = f"SELECT {columns} FROM episodes INDEXED BY episodes_summary WHERE {where} ORDER BY {order} LIMIT ?"  # noqa: S608
        return self._file.rows(sql, (*values, limit))

    def count(self, query: EpisodeQuery = EVERYTHING) -> int:
        where, values = _where(query)
        ((total,),) = self._file.rows(f"SELECT count(*) FROM episodes WHERE {where}", values)  # noqa: S608
        return int(total) if query.limit is None else min(int(total), query.limit)

    def tags(self) -> dict[str, int]:
        return dict(self._file.rows("SELECT tag, count(*) FROM episodes GROUP BY tag ORDER BY tag"))

    def delete_episodes(self, ids: Iterable[str]) -> int:
        deleted = 0
        for batch in batches(ids):
            with self._file.writing() as db:
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
            page = self._file.rows(sql, (*values, last, BATCH if left is None else min(left, BATCH)))
            yield from page
            if len(page) < BATCH:
                return
            last, left = page[-1][0], None if left is None else left - len(page)

    # Ratings

    def add_ratings(self, ratings: Iterable[Rating]) -> int:
        rows = ((r.episode_id, r.judge, r.model_dump_json()) for r in ratings)
        return self._insert("ratings", rows)

    def ratings(self, episode_id: str | None = None, *, judge: str | None = None) -> Iterator[Rating]:
        where = {"episode_id": episode_id, "judge": judge}
        for *key, record in self._keyed("ratings", ("episode_id", "judge"), where):
            yield read_record(Rating, record, where=self.path, what=f"rating {key}")

    def rated_ids(self, judge: str) -> set[str]:
        return {row[0] for row in self._file.rows("SELECT episode_id FROM ratings WHERE judge = ?", (judge,))}

    def judges(self) -> dict[str, int]:
        return dict(self._file.rows("SELECT judge, count(*) FROM ratings GROUP BY judge ORDER BY judge"))

    # Attributions

    def add_attributions(self, attributions: Iterable[Attribution]) -> int:
        rows = ((a.episode_id, a.seat, a.dimension, a.method, a.annotator, a.model_dump_json()) for a in attributions)
        return self._insert("attributions", rows)

    def attributions(
        self, episode_id: str | None = None, *, method: str | None = None, annotator: str | None = None
    ) -> Iterator[Attribution]:
        where = {"episode_id": episode_id, "method": method, "annotator": annotator}
        columns = ("episode_id", "seat", "dimension", "method", "annotator")
        for *key, record in self._keyed("attributions", columns, where):
            yield read_record(Attribution, record, where=self.path, what=f"attribution {key}")

    def attributed(self, *, method: str, annotator: str) -> set[AttributionKey]:
        sql = "SELECT episode_id, seat, dimension FROM attributions WHERE method = ? AND annotator = ?"
        return {(row[0], row[1], row[2]) for row in self._file.rows(sql, (method, annotator))}

    # Failures

    def add_failure(self, stage: str, item_id: str, failure: Failure) -> None:
        self._insert("failures", ((stage, item_id, failure.model_dump_json()),))

    def failures(self, stage: str | None = None) -> Iterator[tuple[str, str, Failure]]:
        for found, item_id, record in self._keyed("failures", ("stage", "item_id"), {"stage": stage}):
            yield found, item_id, read_record(Failure, record, where=self.path, what=f"failure of {item_id} in {found}")

    def delete_failures(self, stage: str, item_ids: Iterable[str] | None = None) -> int:
        with self._file.writing() as db:
            if item_ids is None:
                return db.execute("DELETE FROM failures WHERE stage = ?", (stage,)).rowcount
            sql = "DELETE FROM failures WHERE stage = ? AND item_id = ?"
            return sum(db.execute(sql, (stage, item_id)).rowcount for item_id in item_ids)

    # Originals

    def add_original(self, original: Original) -> None:
        self._insert("originals", ((original.episode_id, original.model_dump_json()),))

    def original(self, episode_id: str) -> Original | None:
        rows = self._file.rows("SELECT record FROM originals WHERE episode_id = ?", (episode_id,))
        return read_record(Original, rows[0][0], where=self.path, what=f"original of {episode_id}") if rows else None

    # Shared

    def _insert(self, table: str, rows: Iterable[tuple[object, ...]]) -> int:
        written = 0
        for batch in batches(rows):
            marks = ", ".join("?" * len(batch[0]))
            with self._file.writing() as db:
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
                f"{conditions} ORDER BY {names} LIMIT {BATCH}"
            )
            page = self._file.rows(sql, (*first, *given.values()))
            yield from page
            if len(page) < BATCH:
                return
            first = page[-1][:-1]

    def close(self) -> None:
        self._file.close()


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
