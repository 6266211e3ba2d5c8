"""A JSONL file as a store: for small sets, for reading exports in place, for one writer at a time.

Opening reads the whole file once and keeps only ids and offsets. Use SQLite for many episodes or several processes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

from sotopia_rl.episode import Attribution, Episode, Failure, Rating, Record
from sotopia_rl.errors import DataError, StoreError
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
from sotopia_rl.store.jsonl import Deletion, JsonlWriter, Line, StageFailure, parse_record, read_records

Key = tuple[str | int, ...]
R = TypeVar("R", bound=Record)


class JsonlStore(EpisodeStore):
    """An `EpisodeStore` in one file. Nothing is written, and no file made, before the first record is added.

    Raises:
        StoreError: The file is missing (with `create=False`) or of another schema version.
        DataError: A line is no record of ours.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self._writer: JsonlWriter | None = None
        self._summaries: dict[str, EpisodeSummary] = {}
        self._conversations: dict[str, str] = {}
        self._offsets: dict[type[Record], dict[Key, int]] = {
            cls: {} for cls in (Episode, Rating, Attribution, StageFailure, Original)
        }
        if path.is_dir():
            raise StoreError(f"{path}: a folder, not a store; give a file such as {path / 'episodes.jsonl'}")
        if path.exists():
            for line, record in read_records(path, torn="skip"):
                self._note(record, line.offset)
        elif not create:
            raise StoreError(f"{path}: no such store; check the path")

    def _note(self, record: Record, offset: int) -> None:
        """Take a line of the file into account."""
        if isinstance(record, Deletion):
            self._forget(record)
            return
        if isinstance(record, Episode):
            conversation = conversation_sha256(record)
            if self._conversations.get(record.id, conversation) != conversation:
                self._forget_about(record.id)
            self._summaries[record.id] = EpisodeSummary.of(record)
            self._conversations[record.id] = conversation
        self._offsets[type(record)][_key(record)] = offset

    def _forget(self, deletion: Deletion) -> None:
        if deletion.what == "failure":
            self._offsets[StageFailure].pop(deletion.key, None)
            return
        (episode_id,) = deletion.key
        self._offsets[Episode].pop(deletion.key, None)
        self._summaries.pop(episode_id, None)
        self._conversations.pop(episode_id, None)
        self._forget_about(episode_id)
        failures = self._offsets[StageFailure]
        for key in [key for key in failures if episode_of(str(key[1])) == episode_id]:
            del failures[key]

    def _forget_about(self, episode_id: str) -> None:
        for cls in (Rating, Attribution, Original):
            offsets = self._offsets[cls]
            for key in [key for key in offsets if key[0] == episode_id]:
                del offsets[key]

    def _add(self, records: Iterable[Record]) -> int:
        if self._writer is None:
            self._writer = JsonlWriter(self.path)
        written = 0
        for record in records:
            self._note(record, self._writer.write(record))
            written += 1
        return written

    def _read(self, cls: type[R], keys: Iterable[Key]) -> Iterator[R]:
        for key in keys:
            with self.path.open("rb") as file:
                file.seek(self._offsets[cls][key])
                data: dict[str, Any] = json.loads(file.readline())
            yield cast("R", parse_record(self.path, Line(0, 0, data)))

    def _keys(self, cls: type[Record], *chosen: str | int | None) -> list[Key]:
        """Keys in order, those with the chosen values (None: any) in their places."""
        return sorted(
            key
            for key in self._offsets[cls]
            if all(value in (None, part) for value, part in zip(chosen, key, strict=False))
        )

    def add_episodes(self, episodes: Iterable[Episode]) -> int:
        return self._add(episodes)

    def episode(self, episode_id: str) -> Episode:
        if episode_id not in self._summaries:
            raise StoreError(f"{self.path}: no episode {episode_id}; `sotopia-rl episodes list` shows what there is")
        return next(self._read(Episode, [(episode_id,)]))

    def episodes(self, query: EpisodeQuery = EVERYTHING) -> Iterator[Episode]:
        return self._read(Episode, [(episode_id,) for episode_id in self.ids(query)])

    def summaries(self, query: EpisodeQuery = EVERYTHING) -> Iterator[EpisodeSummary]:
        ordered = (self._summaries[episode_id] for episode_id in sorted(self._summaries))
        return islice((summary for summary in ordered if query.matches(summary)), query.limit)

    def ids(self, query: EpisodeQuery = EVERYTHING) -> list[str]:
        return [summary.id for summary in self.summaries(query)]

    def count(self, query: EpisodeQuery = EVERYTHING) -> int:
        return len(self.ids(query))

    def tags(self) -> dict[str, int]:
        return dict(sorted(Counter(summary.tag for summary in self._summaries.values()).items()))

    def delete_episodes(self, ids: Iterable[str]) -> int:
        known = [episode_id for episode_id in ids if episode_id in self._summaries]
        return self._add(Deletion(what="episode", key=(episode_id,)) for episode_id in known)

    def add_ratings(self, ratings: Iterable[Rating]) -> int:
        return self._add(ratings)

    def ratings(self, episode_id: str | None = None, *, judge: str | None = None) -> Iterator[Rating]:
        return self._read(Rating, self._keys(Rating, episode_id, judge))

    def rated_ids(self, judge: str) -> set[str]:
        return {str(key[0]) for key in self._keys(Rating, None, judge)}

    def judges(self) -> dict[str, int]:
        return dict(sorted(Counter(str(key[1]) for key in self._offsets[Rating]).items()))

    def add_attributions(self, attributions: Iterable[Attribution]) -> int:
        return self._add(attributions)

    def attributions(
        self, episode_id: str | None = None, *, method: str | None = None, annotator: str | None = None
    ) -> Iterator[Attribution]:
        return self._read(Attribution, self._keys(Attribution, episode_id, None, None, method, annotator))

    def attributed(self, *, method: str, annotator: str) -> set[AttributionKey]:
        keys = self._keys(Attribution, None, None, None, method, annotator)
        return {(str(key[0]), int(key[1]), str(key[2])) for key in keys}

    def add_failure(self, stage: str, item_id: str, failure: Failure) -> None:
        self._add((StageFailure(stage=stage, item_id=item_id, failure=failure),))

    def failures(self, stage: str | None = None) -> Iterator[tuple[str, str, Failure]]:
        for found in self._read(StageFailure, self._keys(StageFailure, stage)):
            yield found.stage, found.item_id, found.failure

    def delete_failures(self, stage: str, item_ids: Iterable[str] | None = None) -> int:
        wanted = None if item_ids is None else set(item_ids)
        keys = [(stage, str(key[1])) for key in self._keys(StageFailure, stage)]
        return self._add(Deletion(what="failure", key=key) for key in keys if wanted is None or key[1] in wanted)

    def add_original(self, original: Original) -> None:
        self._add((original,))

    def original(self, episode_id: str) -> Original | None:
        return next(self._read(Original, self._keys(Original, episode_id)), None)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def _key(record: Record) -> Key:
    match record:
        case Episode():
            return (record.id,)
        case Rating():
            return record.episode_id, record.judge
        case Attribution():
            return record.episode_id, record.seat, record.dimension, record.method, record.annotator
        case StageFailure():
            return record.stage, record.item_id
        case Original():
            return (record.episode_id,)
        case _:
            raise DataError(f"a {type(record).__name__} is nothing a store keeps")
