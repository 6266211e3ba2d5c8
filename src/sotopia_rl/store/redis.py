"""SOTOPIA's database: Redis with the JSON and search modules, read and written in SOTOPIA's own layout.

Judged episodes are there for SOTOPIA as `EpisodeLog` documents under `:sotopia.database.logs.EpisodeLog:{id}`, with
the agents' and environments' profiles beside them where they were missing. Everything we keep, failures, every judge
and provenance included, is in keys of our own (`sotopia-rl:`), which SOTOPIA does not look at. An EpisodeLog that
SOTOPIA wrote is taken up when the store is opened, and stays as it is until its episode is deleted or replaced; one
of ours holds the first judge's scores.

    sotopia-rl:schema_version             string
    sotopia-rl:ids                        sorted set of episode ids, all with score 0: ordered by id
    sotopia-rl:summaries                  hash, id -> JSON
    sotopia-rl:episode:{id}               string, JSON
    sotopia-rl:ratings:{id}               hash, judge -> JSON
    sotopia-rl:attributions:{id}          hash, [seat, dimension, method, annotator] -> JSON
    sotopia-rl:failures                   hash, [stage, item id] -> JSON
    sotopia-rl:originals                  hash, id -> JSON, empty where the EpisodeLog itself is the original
    sotopia-rl:logs                       set of the ids whose EpisodeLog we wrote
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sotopia_rl.episode import Attribution, Episode, Failure, Rating
from sotopia_rl.errors import DataError, StoreError
from sotopia_rl.profiles import Profiles
from sotopia_rl.store import sotopia_redis
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
from sotopia_rl.store.records import batches, read_record
from sotopia_rl.store.redis_server import OWN, RedisServer
from sotopia_rl.store.sotopia_read import LeftOutError, read_document
from sotopia_rl.store.sotopia_write import log_document
from sotopia_rl.store.transfer import TransferReport

logger = logging.getLogger(__name__)

IDS, SUMMARIES, FAILURES, ORIGINALS = OWN + "ids", OWN + "summaries", OWN + "failures", OWN + "originals"
LOGS = OWN + "logs"


@dataclass(frozen=True)
class _Held:
    """What is there of one episode."""

    episode: Episode | None
    ratings: dict[str, Rating]
    """By judge. A log of ours that is made anew takes the first."""
    original: Original | None
    log_judge: str | None
    """Whose scores the EpisodeLog holds."""
    log_is_theirs: bool
    """There is an EpisodeLog, and it is not of our making."""


class RedisStore(EpisodeStore):
    """An `EpisodeStore` in SOTOPIA's Redis.

    Args:
        url: `redis://[:password@]host:port[/0]`; empty, or bare `redis`, for the one in `REDIS_OM_URL`.

    Raises:
        StoreError: No Redis answers, it lacks a module, or our keys in it are of another schema version.
        MissingExtraError: The `redis` package is not installed (on import of this module).
    """

    def __init__(self, url: str = "") -> None:
        self._server = RedisServer(url)
        self.where, self._db = self._server.where, self._server.db
        with self._server.errors_told():
            sotopia_redis.create_indexes(self._db)
        report = self.adopt()
        if report.left_out:
            logger.warning("%s: some of sotopia's episodes cannot be represented here: %s", self.where, report)

    # Sotopia's own episodes

    def adopt(self) -> TransferReport:
        """Take up the EpisodeLogs that are not known here yet. They stay as they are; our records go beside them.

        Called when the store is opened; call it again to see what was written since.
        """
        report = TransferReport()
        with self._server.errors_told():
            for keys in batches(self._db.scan_iter(match=f"{sotopia_redis.EPISODE_LOG}*", count=1000)):
                ids = [key.removeprefix(sotopia_redis.EPISODE_LOG) for key in keys]
                known = self._db.zmscore(IDS, ids)
                self._adopt(
                    [pk for pk, score in zip(ids, known, strict=True) if score is None and ":" not in pk], report
                )
        return report

    def _adopt(self, ids: Sequence[str], report: TransferReport) -> None:
        documents = sotopia_redis.documents(self._db, sotopia_redis.EPISODE_LOG, ids)
        profiles = sotopia_redis.profiles_of(self._db, documents.values())
        for pk, document in documents.items():
            where = f"{self.where} {sotopia_redis.EPISODE_LOG}{pk}"
            try:
                item = read_document(document, where=where, known=profiles)
            except LeftOutError as error:
                report.left_out[error.cause] += 1
                continue
            except DataError as error:
                logger.warning("%s", error)
                report.left_out["not an episode of sotopia's"] += 1
                continue
            with self._server.writing() as pipeline:
                _put_episode(pipeline, item.episode)
                pipeline.hset(ORIGINALS, pk, "")
                if item.rating:
                    pipeline.hset(_ratings_key(pk), item.rating.judge, item.rating.model_dump_json())
            report.episodes += 1
            report.ratings += item.rating is not None
            report.notes.update(item.notes)

    def profiles(self) -> Profiles:
        """Every character, scenario, combo and relationship that SOTOPIA keeps in this Redis."""
        with self._server.errors_told():
            return sotopia_redis.all_profiles(self._db)

    def _held(self, ids: Sequence[str]) -> dict[str, _Held]:
        """What is there of some episodes, in one round trip."""
        pipeline = self._db.pipeline(transaction=False)
        for one in ids:
            pipeline.get(_episode_key(one))
            pipeline.hgetall(_ratings_key(one))
            pipeline.hget(ORIGINALS, one)
            pipeline.execute_command("JSON.GET", sotopia_redis.EPISODE_LOG + one, "$.models[0]")
            pipeline.sismember(LOGS, one)
        with self._server.errors_told():
            answers = iter(pipeline.execute())
        found = {}
        for one in ids:
            text, ratings, original, judge, ours = islice(answers, 5)
            found[one] = _Held(
                episode=read_record(Episode, text, where=self.where, what=f"episode {one}") if text else None,
                ratings={
                    name: read_record(Rating, of, where=self.where, what=f"rating of {one}")
                    for name, of in sorted(ratings.items())
                },
                original=read_record(Original, original, where=self.where, what=f"original of {one}")
                if original
                else None,
                log_judge=(json.loads(judge) or [None])[0] if judge else None,
                log_is_theirs=bool(judge) and not ours,
            )
        return found

    def _update_log(self, pipeline: Any, episode: Episode, held: _Held) -> None:
        """Bring the EpisodeLog in line with our records: made, replaced, or removed where there can be none."""
        if held.log_is_theirs:
            return
        key = sotopia_redis.EPISODE_LOG + episode.id
        rating = held.ratings.get(held.log_judge or "") or next(iter(held.ratings.values()), None)
        try:
            document = log_document(episode, rating, held.original)
        except LeftOutError:
            pipeline.delete(key)
            pipeline.srem(LOGS, episode.id)
            return
        sotopia_redis.put_profiles(pipeline, episode.match)
        pipeline.execute_command("JSON.SET", key, "$", json.dumps(document, ensure_ascii=False))
        pipeline.sadd(LOGS, episode.id)

    # Episodes

    def add_episodes(self, episodes: Iterable[Episode]) -> int:
        written = 0
        for batch in batches(episodes):
            held = self._held([episode.id for episode in batch])
            with self._server.writing() as pipeline:
                for episode in batch:
                    before = held[episode.id].episode
                    _put_episode(pipeline, episode)
                    if before and conversation_sha256(before) != conversation_sha256(episode):
                        _drop(pipeline, episode.id)
                    else:
                        self._update_log(pipeline, episode, held[episode.id])
            written += len(batch)
        return written

    def episode(self, episode_id: str) -> Episode:
        with self._server.errors_told():
            text = self._db.get(_episode_key(episode_id))
        if text is None:
            raise StoreError(f"{self.where}: no episode {episode_id}; `sotopia-rl episodes list` shows what there is")
        return read_record(Episode, text, where=self.where, what=f"episode {episode_id}")

    def episodes(self, query: EpisodeQuery = EVERYTHING) -> Iterator[Episode]:
        for batch in batches(summary.id for summary in self.summaries(query)):
            with self._server.errors_told():
                texts = self._db.mget([_episode_key(episode_id) for episode_id in batch])
            for episode_id, text in zip(batch, texts, strict=True):
                if text is not None:  # deleted meanwhile
                    yield read_record(Episode, text, where=self.where, what=f"episode {episode_id}")

    def summaries(self, query: EpisodeQuery = EVERYTHING) -> Iterator[EpisodeSummary]:
        return islice((s for s in self._all_summaries() if query.matches(s)), query.limit)

    def _all_summaries(self) -> Iterator[EpisodeSummary]:
        last = "-"
        while True:
            with self._server.errors_told():
                ids = self._db.zrangebylex(IDS, last, "+", start=0, num=1000)
                texts = self._db.hmget(SUMMARIES, ids) if ids else []
            for episode_id, text in zip(ids, texts, strict=True):
                if text is not None:
                    yield EpisodeSummary(episode_id, *json.loads(text))
            if not ids:
                return
            last = f"({ids[-1]}"

    def ids(self, query: EpisodeQuery = EVERYTHING) -> list[str]:
        return [summary.id for summary in self.summaries(query)]

    def count(self, query: EpisodeQuery = EVERYTHING) -> int:
        return len(self.ids(query))

    def tags(self) -> dict[str, int]:
        return dict(sorted(Counter(summary.tag for summary in self._all_summaries()).items()))

    def delete_episodes(self, ids: Iterable[str]) -> int:
        deleted = 0
        with self._server.errors_told():
            failures = [(episode_of(json.loads(key)[1]), key) for key in self._db.hkeys(FAILURES)]
        for episode_id in ids:
            with self._server.errors_told():
                deleted += bool(self._db.exists(_episode_key(episode_id)))
            with self._server.writing() as pipeline:
                _drop(pipeline, episode_id)
                pipeline.delete(_episode_key(episode_id))
                pipeline.zrem(IDS, episode_id)
                pipeline.hdel(SUMMARIES, episode_id)
                for key in (key for of, key in failures if of == episode_id):
                    pipeline.hdel(FAILURES, key)
        return deleted

    # What is said of them

    def add_ratings(self, ratings: Iterable[Rating]) -> int:
        written = 0
        for batch in batches(ratings):
            held = self._held(sorted({rating.episode_id for rating in batch}))
            with self._server.writing() as pipeline:
                for rating in batch:
                    pipeline.hset(_ratings_key(rating.episode_id), rating.judge, rating.model_dump_json())
                    held[rating.episode_id].ratings[rating.judge] = rating
                for state in held.values():
                    if state.episode:
                        self._update_log(pipeline, state.episode, state)
            written += len(batch)
        return written

    def ratings(self, episode_id: str | None = None, *, judge: str | None = None) -> Iterator[Rating]:
        for found, key, text in self._said("ratings", episode_id):
            if judge in (None, key):
                yield read_record(Rating, text, where=self.where, what=f"rating of {found} by {key}")

    def rated_ids(self, judge: str) -> set[str]:
        return {episode_id for episode_id, key, _ in self._said("ratings", None) if key == judge}

    def judges(self) -> dict[str, int]:
        return dict(sorted(Counter(judge for _, judge, _ in self._said("ratings", None)).items()))

    def add_attributions(self, attributions: Iterable[Attribution]) -> int:
        written = 0
        for batch in batches(attributions):
            with self._server.writing() as pipeline:
                for a in batch:
                    key = json.dumps([a.seat, a.dimension, a.method, a.annotator])
                    pipeline.hset(f"{OWN}attributions:{a.episode_id}", key, a.model_dump_json())
            written += len(batch)
        return written

    def attributions(
        self, episode_id: str | None = None, *, method: str | None = None, annotator: str | None = None
    ) -> Iterator[Attribution]:
        for found, key, text in self._said("attributions", episode_id):
            _, _, its_method, its_annotator = json.loads(key)
            if method in (None, its_method) and annotator in (None, its_annotator):
                yield read_record(Attribution, text, where=self.where, what=f"attribution {key} of {found}")

    def attributed(self, *, method: str, annotator: str) -> set[AttributionKey]:
        keys = ((found, json.loads(key)) for found, key, _ in self._said("attributions", None))
        return {(found, key[0], key[1]) for found, key in keys if key[2:] == [method, annotator]}

    def _said(self, what: str, episode_id: str | None) -> Iterator[tuple[str, str, str]]:
        """(episode id, key, JSON) of ratings or attributions, in order."""
        prefix = f"{OWN}{what}:"
        with self._server.errors_told():
            # Not by the known episodes: what is said of an episode may be kept apart from it.
            found = self._db.scan_iter(match=f"{prefix}*", count=1000)
            ids = [episode_id] if episode_id else sorted(key.removeprefix(prefix) for key in found)
        for batch in batches(ids):
            with self._server.errors_told():
                pipeline = self._db.pipeline(transaction=False)
                for one in batch:
                    pipeline.hgetall(prefix + one)
                hashes = pipeline.execute()
            for one, entries in zip(batch, hashes, strict=True):
                yield from ((one, key, entries[key]) for key in sorted(entries))

    def add_failure(self, stage: str, item_id: str, failure: Failure) -> None:
        with self._server.writing() as pipeline:
            pipeline.hset(FAILURES, json.dumps([stage, item_id]), failure.model_dump_json())

    def failures(self, stage: str | None = None) -> Iterator[tuple[str, str, Failure]]:
        with self._server.errors_told():
            entries = self._db.hgetall(FAILURES)
        for (found, item_id), text in sorted((json.loads(key), text) for key, text in entries.items()):
            if stage in (None, found):
                yield (
                    found,
                    item_id,
                    read_record(Failure, text, where=self.where, what=f"failure of {item_id} in {found}"),
                )

    def delete_failures(self, stage: str, item_ids: Iterable[str] | None = None) -> int:
        wanted = [i for _, i, _ in self.failures(stage)] if item_ids is None else list(item_ids)
        with self._server.errors_told():
            return sum(self._db.hdel(FAILURES, json.dumps([stage, item_id])) for item_id in wanted)

    def add_original(self, original: Original) -> None:
        with self._server.errors_told():
            if self._db.hget(ORIGINALS, original.episode_id) != "":  # else the EpisodeLog is here itself
                self._db.hset(ORIGINALS, original.episode_id, original.model_dump_json())
                self.add_episode(self.episode(original.episode_id))

    def original(self, episode_id: str) -> Original | None:
        with self._server.errors_told():
            text = self._db.hget(ORIGINALS, episode_id)
            if text is None:
                return None
            if text:
                return read_record(Original, text, where=self.where, what=f"original of {episode_id}")
            found = sotopia_redis.documents(self._db, sotopia_redis.EPISODE_LOG, [episode_id])
        document = found.get(episode_id)
        return Original(episode_id=episode_id, layout="sotopia-log", document=document) if document else None

    def close(self) -> None:
        self._db.close()


def _episode_key(episode_id: str) -> str:
    return f"{OWN}episode:{episode_id}"


def _ratings_key(episode_id: str) -> str:
    return f"{OWN}ratings:{episode_id}"


def _put_episode(pipeline: Any, episode: Episode) -> None:
    _, *summary = EpisodeSummary.of(episode)
    pipeline.set(_episode_key(episode.id), episode.model_dump_json())
    pipeline.zadd(IDS, {episode.id: 0})
    pipeline.hset(SUMMARIES, episode.id, json.dumps(summary))


def _drop(pipeline: Any, episode_id: str) -> None:
    """Remove what is said of an episode, the EpisodeLog included."""
    pipeline.delete(_ratings_key(episode_id), f"{OWN}attributions:{episode_id}", sotopia_redis.EPISODE_LOG + episode_id)
    pipeline.hdel(ORIGINALS, episode_id)
    pipeline.srem(LOGS, episode_id)
