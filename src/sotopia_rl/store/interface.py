"""What a store of episodes can be asked, whatever keeps it: SQLite, Redis or a JSONL file.

Every listing is ordered by episode id, so that a resumed run exports the same records in the same order
as an unbroken one. Iterators read in small pages: memory stays constant, and writing while iterating is
allowed (a record written meanwhile appears if its id is still ahead). Calls are short and synchronous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from pydantic import Field

from sotopia_rl.episode import (
    Attribution,
    Episode,
    EpisodeStatus,
    Failure,
    Rating,
    Record,
    canonical_json,
    sha256_text,
)
from sotopia_rl.errors import DataError, FailureKind


class EpisodeQuery(Record):
    """Which episodes are meant; what is None does not narrow the choice."""

    tag: str | None = None
    model: str | None = None
    """Model string of an agent, in either seat."""
    scenario_id: str | None = None
    codename: str | None = None
    """Of the scenario. Several scenarios may share a codename."""
    status: EpisodeStatus | None = None
    limit: int | None = Field(default=None, ge=0)
    """At most so many, the smallest ids first."""

    def matches(self, summary: EpisodeSummary) -> bool:
        """Whether an episode is meant, `limit` apart."""
        return (
            self.tag in (None, summary.tag)
            and (self.model is None or self.model in summary.models)
            and self.scenario_id in (None, summary.scenario_id)
            and self.codename in (None, summary.codename)
            and self.status in (None, summary.status)
        )


EVERYTHING = EpisodeQuery()


class EpisodeSummary(NamedTuple):
    """What a listing shows of an episode, without reading the conversation. A plain tuple: listings are long."""

    id: str
    tag: str
    scenario_id: str
    codename: str
    model0: str
    model1: str
    status: EpisodeStatus
    num_turns: int
    failure_kind: FailureKind | None

    @property
    def models(self) -> tuple[str, str]:
        """By seat."""
        return self.model0, self.model1

    @classmethod
    def of(cls, episode: Episode) -> EpisodeSummary:
        return cls(
            id=episode.id,
            tag=episode.tag,
            scenario_id=episode.match.scenario.id,
            codename=episode.match.scenario.codename,
            model0=episode.agents[0].model,
            model1=episode.agents[1].model,
            status=episode.status,
            num_turns=len(episode.turns),
            failure_kind=episode.failure.kind if episode.failure else None,
        )


class Original(Record):
    """A foreign record as it was imported, kept so that exporting it again changes nothing."""

    episode_id: str
    layout: str
    """`sotopia-log` (EpisodeLog, as in Redis) or `sotopia-jsonl` (a line of `episodes_to_jsonl`)."""
    document: dict[str, Any]


AttributionKey = tuple[str, int, str]
"""(episode id, seat, dimension)."""


def conversation_sha256(episode: Episode) -> str:
    """Hash of who met where and what was done: what ratings and attributions are about."""
    actions: list[object] = [[t.seat, t.action.action_type, t.action.argument] for t in episode.turns]
    return sha256_text(canonical_json({"match": episode.match.id, "actions": actions}))


class EpisodeStore(Protocol):
    """Keeps episodes, ratings, attributions and failures. Every method may raise `StoreError`.

    Writing a record whose key is already there replaces it: an episode's key is its id, a rating's is
    (episode, judge), an attribution's is (episode, seat, dimension, method, annotator), a failure's is
    (stage, item id). Where the replaced episode holds another conversation, its ratings and attributions
    go with it, because they speak of words that no longer exist.

    What has a body here is the same for every kind of store, which inherits it.
    """

    def add_episode(self, episode: Episode) -> None:
        self.add_episodes((episode,))

    def add_episodes(self, episodes: Iterable[Episode]) -> int:
        """Write many, some hundreds per transaction; how many were written."""
        ...

    def episode(self, episode_id: str) -> Episode:
        """One episode; `StoreError` where there is none of that id."""
        ...

    def episodes(self, query: EpisodeQuery = EVERYTHING) -> Iterator[Episode]: ...

    def summaries(self, query: EpisodeQuery = EVERYTHING) -> Iterator[EpisodeSummary]: ...

    def ids(self, query: EpisodeQuery = EVERYTHING) -> list[str]: ...

    def count(self, query: EpisodeQuery = EVERYTHING) -> int: ...

    def tags(self) -> dict[str, int]:
        """Every tag with its number of episodes."""
        ...

    def delete_episodes(self, ids: Iterable[str]) -> int:
        """Remove episodes with their ratings, attributions and failures, read or not; how many were there."""
        ...

    def add_rating(self, rating: Rating) -> None:
        self.add_ratings((rating,))

    def add_ratings(self, ratings: Iterable[Rating]) -> int: ...

    def ratings(self, episode_id: str | None = None, *, judge: str | None = None) -> Iterator[Rating]: ...

    def rated(self, query: EpisodeQuery = EVERYTHING, *, judge: str | None = None) -> Iterator[tuple[Episode, Rating]]:
        """Each episode with each of its ratings, by episode id and judge."""
        for episode in self.episodes(query):
            for rating in self.ratings(episode.id, judge=judge):
                yield episode, rating

    def rated_ids(self, judge: str) -> set[str]:
        """Episodes this judge has rated; what a resumed judge run leaves out."""
        ...

    def judges(self) -> dict[str, int]:
        """Every judge with its number of ratings."""
        ...

    def add_attribution(self, attribution: Attribution) -> None:
        self.add_attributions((attribution,))

    def add_attributions(self, attributions: Iterable[Attribution]) -> int: ...

    def attributions(
        self, episode_id: str | None = None, *, method: str | None = None, annotator: str | None = None
    ) -> Iterator[Attribution]: ...

    def attributed(self, *, method: str, annotator: str) -> set[AttributionKey]:
        """What is attributed already; what a resumed annotation run leaves out."""
        ...

    def add_failure(self, stage: str, item_id: str, failure: Failure) -> None:
        """Keep why `item_id` has no result in `stage`, for instance a judge's or an annotator's failure."""
        ...

    def failures(self, stage: str | None = None) -> Iterator[tuple[str, str, Failure]]:
        """(stage, item id, failure)."""
        ...

    def delete_failures(self, stage: str, item_ids: Iterable[str] | None = None) -> int:
        """Forget a stage's failures, or only those of some items, before they are tried again."""
        ...

    def add_original(self, original: Original) -> None: ...

    def original(self, episode_id: str) -> Original | None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def refuse_empty(store: EpisodeStore, query: EpisodeQuery) -> None:
    """Raises DataError where no episode is meant, with the tags there are."""
    if store.count(query):
        return
    wanted = query.model_dump(exclude_none=True, exclude={"status", "limit"})
    has = " and ".join(f"the {name.replace('_', ' ')} {value!r}" for name, value in wanted.items())
    status = f"{query.status} " if query.status else ""
    raise DataError(
        f"no {status}episode {f'has {has}' if has else 'is there'}; tags in this store: {with_counts(store.tags())}"
    )


def episode_of(item_id: str) -> str:
    """The episode whose failure is kept under `item_id`: its id, or its id, a slash and what was asked about it."""
    return item_id.partition("/")[0]


def with_counts(numbers: Mapping[str, int]) -> str:
    """`demo (12), other (3)`."""
    return ", ".join(f"{name} ({count})" for name, count in numbers.items()) or "none"
