"""The pieces of work that attribution is made of, and the keys under which it is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from sotopia_rl.attribute.config import AttributionConfig
from sotopia_rl.episode import Episode, Rating, Seat


class AttributionKey(NamedTuple):
    """What makes an attribution unique; a resumed run skips the keys it has."""

    episode_id: str
    seat: Seat
    dimension: str
    method: str
    annotator: str


@dataclass(frozen=True)
class AttributionItem:
    """One piece of work: some dimensions of one agent in one episode. It succeeds or fails as a whole."""

    episode: Episode
    rating: Rating
    seat: Seat
    dimensions: tuple[str, ...]

    def key(self, dimension: str, config: AttributionConfig, annotator: str) -> AttributionKey:
        return AttributionKey(self.episode.id, self.seat, dimension, config.label, annotator)


def nothing_done(_key: AttributionKey) -> bool:
    return False


def attribution_items(
    items: Iterable[tuple[Episode, Rating]],
    config: AttributionConfig,
    annotator: str,
    done: Callable[[AttributionKey], bool] = nothing_done,
) -> Iterator[AttributionItem]:
    """Split episodes into items, leaving out those whose every dimension is done already.

    An item that is half done is asked again as a whole: its question, and so its answer, is then the one that an
    unbroken run would have had.
    """
    seats: tuple[Seat, Seat] = (0, 1)
    for episode, rating in items:
        if rating.episode_id != episode.id:
            raise ValueError(f"rating of episode {rating.episode_id} came with episode {episode.id}")
        for seat in seats:
            for group in config.groups:
                item = AttributionItem(episode, rating, seat, group)
                if not all(done(item.key(name, config, annotator)) for name in group):
                    yield item
