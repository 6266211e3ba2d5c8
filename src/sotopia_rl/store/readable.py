"""Going through many episodes of which some records are damaged: those come as failures, and the rest goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sotopia_rl.episode import Episode, Failure, Rating
from sotopia_rl.errors import DamagedRecordError
from sotopia_rl.store.interface import EpisodeQuery, EpisodeStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unreadable:
    """An episode whose record, or whose rating, cannot be read."""

    episode_id: str
    failure: Failure


def readable_episodes(store: EpisodeStore, ids: Iterable[str]) -> Iterator[Episode | Unreadable]:
    """Each episode, or why it cannot be read."""
    for episode_id in ids:
        try:
            episode = store.episode(episode_id)
        except DamagedRecordError as error:
            yield _unreadable(episode_id, error)
        else:
            yield episode


def readable_rated(
    store: EpisodeStore, query: EpisodeQuery, judge: str
) -> Iterator[tuple[Episode, Rating] | Unreadable]:
    """Each episode with its rating by `judge`, or why one of them cannot be read."""
    for episode_id in sorted(store.rated_ids(judge).intersection(store.ids(query))):
        try:
            pairs = [(store.episode(episode_id), rating) for rating in store.ratings(episode_id, judge=judge)]
        except DamagedRecordError as error:
            yield _unreadable(episode_id, error)
        else:
            yield from pairs


def _unreadable(episode_id: str, error: DamagedRecordError) -> Unreadable:
    logger.warning("%s", error)
    return Unreadable(episode_id, Failure(kind="bad_input", message=str(error)))
