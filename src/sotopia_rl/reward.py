"""From attributions to rewards: A x G per dimension, normalised over the data set, combined into one scalar.

Two passes, each lazy: `fit_normaliser` over the data set, then `utterance_rewards` per episode. The normaliser is a
record that is stored with the data and applied to later data unchanged.

On signs. G may be negative (relationship -5..5, secret and social_rules -10..0). A x G then blames: the utterance
that was decisive for a bad outcome gets the worst reward, one that had no effect gets 0. |A x G| never exceeds |G|
and never has the other sign. Min-max puts the worst blame of the data at 0 and the greatest credit at 1; "no
effect" lies between where the data has both signs, and at an end where it has one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sotopia_rl.config import Config
from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS
from sotopia_rl.episode import Attribution, Episode, Rating, Record, Seat, Turn, UtteranceReward
from sotopia_rl.errors import DataError

logger = logging.getLogger(__name__)

TOP_REWARD = 10.0
"""Rewards are put on 0..10."""


class RewardConfig(Config):
    """How attributed scores become one reward per utterance."""

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={"goal": 1.0, "relationship": 1.0, "knowledge": 1.0}, min_length=1
    )
    """Dimensions of the reward and their weights; they are divided by their sum."""
    normalise: Literal["min_max", "range"] = "min_max"
    """min_max: by the least and greatest value in the data set; range: by what the dimension's scores allow."""
    granularity: Literal["utterance", "episode"] = "utterance"
    """episode: every utterance of an agent gets its whole episode score (the baseline without attribution)."""
    unscored: dict[str, float] = Field(default={"conversation_behaviour": 10.0})
    """Attributed dimensions that no judge scores, and the points that a decisive utterance earns in them."""
    clip_low: float = Field(default=0.0, ge=0, le=TOP_REWARD)
    """Least reward, after penalties."""
    clip_high: float = Field(default=TOP_REWARD, ge=0, le=TOP_REWARD)
    """Greatest reward, after penalties."""
    length_penalty: float = Field(default=0.0, ge=0)
    """Reward taken off per word beyond `length_limit_words`."""
    length_limit_words: int = Field(default=60, ge=0)
    """Words of an utterance that cost nothing."""
    secret_penalty: float = Field(default=0.0, ge=0)
    """Reward taken off per point that the agent lost on `secret` (attributed to utterances where it was attributed)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.clip_low >= self.clip_high:
            raise ValueError(f"clip_low {self.clip_low:g} is not below clip_high {self.clip_high:g}")
        return self


class Normaliser(Record):
    """Puts points of each dimension on 0..1. Values outside the fitted bounds are clipped."""

    method: Literal["min_max", "range"]
    low: dict[str, float]
    high: dict[str, float]
    num_utterances: int = Field(ge=0)
    """How many it was fitted on."""

    @property
    def constant(self) -> tuple[str, ...]:
        """Dimensions with one single value in the data: they tell no utterance from another."""
        return tuple(name for name in self.low if self.low[name] == self.high[name])

    def normalise(self, points: Mapping[str, float]) -> dict[str, float]:
        """Each dimension on 0..1; a constant dimension is 0.5 throughout.

        Raises:
            ValueError: It was not fitted on one of the dimensions.
        """
        unknown = [name for name in points if name not in self.low]
        if unknown:
            raise ValueError(f"the normaliser was not fitted on {', '.join(unknown)} (it knows {', '.join(self.low)})")
        return {name: self._one(name, value) for name, value in points.items()}

    def _one(self, name: str, value: float) -> float:
        low, high = self.low[name], self.high[name]
        if low == high:
            return 0.5
        return min(max((value - low) / (high - low), 0.0), 1.0)


@dataclass(frozen=True)
class Credited:
    """An episode with the rating and the attributions that its rewards are made of.

    At most one attribution per seat and dimension: choose method and annotator before.
    """

    episode: Episode
    rating: Rating
    attributions: tuple[Attribution, ...] = ()


@dataclass(frozen=True)
class UtterancePoints:
    """Attribution x score of one utterance by dimension, in points."""

    turn: Turn
    points: dict[str, float]
    secret_lost: float
    """Points lost on `secret`, 0 or more."""


def fit_normaliser(data: Iterable[Credited], config: RewardConfig) -> Normaliser:
    """Bounds of every dimension over a data set, read once and lazily.

    Raises:
        DataError: As `utterance_points`; or there is no utterance at all.
    """
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    count = 0
    for credited in data:
        for utterance in utterance_points(credited, config):
            count += 1
            for name, value in utterance.points.items():
                low[name] = min(value, low.get(name, value))
                high[name] = max(value, high.get(name, value))
    if config.normalise == "range":
        low, high = _ranges(config)
    elif not count:
        raise DataError("no utterance to fit the normaliser on: the data set is empty, or nobody in it said a word")
    normaliser = Normaliser(method=config.normalise, low=low, high=high, num_utterances=count)
    for name in normaliser.constant:
        logger.warning(
            "dimension %s is %g for all %d utterances: it adds nothing to the reward", name, low[name], count
        )
    return normaliser


def _ranges(config: RewardConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Bounds of A x G from the bounds of G: an utterance without effect earns 0."""
    ranges = {d.name: (min(0.0, d.low), max(0.0, d.high)) for d in SOTOPIA_DIMENSIONS}
    ranges |= {name: (0.0, points) for name, points in config.unscored.items()}
    unknown = [name for name in config.weights if name not in ranges]
    if unknown:
        raise DataError(f"normalise: range needs a known range, {', '.join(unknown)} has none; use min_max")
    return {n: ranges[n][0] for n in config.weights}, {n: ranges[n][1] for n in config.weights}


def utterance_rewards(credited: Credited, config: RewardConfig, normaliser: Normaliser) -> list[UtteranceReward]:
    """Rewards of one episode, in turn order, for the agents that have attributions.

    Raises:
        DataError: As `utterance_points`.
        ValueError: The normaliser was fitted on other dimensions.
    """
    return [_reward(credited.episode.id, u, config, normaliser) for u in utterance_points(credited, config)]


def _reward(
    episode_id: str, utterance: UtterancePoints, config: RewardConfig, normaliser: Normaliser
) -> UtteranceReward:
    normalised = normaliser.normalise(utterance.points)
    total = math.fsum(config.weights.values())
    mean = math.fsum(config.weights[name] * value for name, value in normalised.items()) / total
    reward = TOP_REWARD * mean - _penalty(utterance, config)
    return UtteranceReward(
        episode_id=episode_id,
        turn=utterance.turn.index,
        seat=utterance.turn.seat,
        points=utterance.points,
        normalised=normalised,
        reward=min(max(reward, config.clip_low), config.clip_high),
    )


def _penalty(utterance: UtterancePoints, config: RewardConfig) -> float:
    words = len(utterance.turn.action.argument.split())
    beyond = max(0, words - config.length_limit_words)
    return config.length_penalty * beyond + config.secret_penalty * utterance.secret_lost


def utterance_points(credited: Credited, config: RewardConfig) -> list[UtterancePoints]:
    """A x G of every utterance, in turn order.

    With `granularity: episode` A is 1 for every utterance of both agents and no attribution is needed.

    Raises:
        DataError: A score or an attribution is missing, doubled, or does not fit the episode.
    """
    seats: tuple[Seat, Seat] = (0, 1)
    chosen = {(a.seat, a.dimension): a for a in credited.attributions}
    if len(chosen) < len(credited.attributions):
        raise DataError(f"episode {credited.episode.id}: a seat and dimension has two attributions; choose one method")
    by_turn: dict[int, UtterancePoints] = {}
    for seat in seats:
        if config.granularity == "episode" or any(a.seat == seat for a in credited.attributions):
            by_turn.update(_points_of_seat(credited, seat, chosen, config))
    return [by_turn[index] for index in sorted(by_turn)]


def _points_of_seat(
    credited: Credited, seat: Seat, chosen: Mapping[tuple[Seat, str], Attribution], config: RewardConfig
) -> dict[int, UtterancePoints]:
    turns = credited.episode.utterances(seat)
    vectors: dict[int, dict[str, float]] = {turn.index: {} for turn in turns}
    for name in config.weights:
        score = _score(credited, seat, name, config)
        share = _shares(credited, seat, name, chosen, config)
        for turn in turns:
            vectors[turn.index][name] = share[turn.index] * score + 0.0  # never -0.0
    lost = -min(0.0, credited.rating.points(seat).get("secret", 0.0))
    leak = (
        _shares(credited, seat, "secret", chosen, config) if (seat, "secret") in chosen else dict.fromkeys(vectors, 1.0)
    )
    return {t.index: UtterancePoints(t, vectors[t.index], lost * leak[t.index]) for t in turns}


def _score(credited: Credited, seat: Seat, name: str, config: RewardConfig) -> float:
    points = credited.rating.points(seat)
    if name in points:
        return points[name]
    if name in config.unscored and config.granularity == "utterance":
        return config.unscored[name]
    raise DataError(
        f"episode {credited.episode.id}, seat {seat}: judge {credited.rating.judge} gave no score for {name!r}; "
        "judge it on that dimension or take it out of the reward's weights"
    )


def _shares(
    credited: Credited,
    seat: Seat,
    name: str,
    chosen: Mapping[tuple[Seat, str], Attribution],
    config: RewardConfig,
) -> dict[int, float]:
    """A by turn index, each in 0..1."""
    turns = [turn.index for turn in credited.episode.utterances(seat)]
    if config.granularity == "episode":
        return dict.fromkeys(turns, 1.0)
    where = f"(episode {credited.episode.id}, seat {seat}, {name})"
    attribution = chosen.get((seat, name))
    if attribution is None:
        raise DataError(f"no attribution {where}; annotate that dimension or take it out of the reward's weights")
    if [w.turn for w in attribution.weights] != turns:
        weighed = [w.turn for w in attribution.weights]
        raise DataError(f"attribution has weights for turns {weighed}, the utterances are turns {turns} {where}")
    top = attribution.top_weight
    for w in attribution.weights:
        if not 0 <= w.weight <= top * (1 + 1e-9):
            raise DataError(f"weight {w.weight:g} of turn {w.turn} is outside 0 to {top:g} {where}")
    return {w.turn: min(w.weight / top, 1.0) for w in attribution.weights}
