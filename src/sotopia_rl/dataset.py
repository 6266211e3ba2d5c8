"""Training rows: from episodes and rewards to what SFT, the reward model and GRPO read.

A row is one utterance. Its prompt is what `observe.agent_prompt` renders for that turn, the very text that the
agent was or will be sent; its completion is the canonical JSON of the action. Rows are TRL's prompt-completion form,
one JSON object a line, or the JSON arrays of the paper's code. Everything here streams: one episode in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator

from sotopia_rl.config import Config
from sotopia_rl.episode import Episode, Rating, Record, Seat, Turn, UtteranceReward
from sotopia_rl.errors import DataError
from sotopia_rl.files import write_lines, write_text
from sotopia_rl.models import Message
from sotopia_rl.observe import agent_prompt


class PromptRow(Record):
    """A prompt to answer (GRPO), and where it comes from."""

    prompt: tuple[Message, ...] = Field(min_length=1)
    episode_id: str
    scenario_id: str
    turn: int = Field(ge=0)
    seat: Seat

    def paper_form(self) -> dict[str, object]:
        """The row as the paper's code writes it; its GRPO trainer reads `input` only."""
        return {"input": self.prompt[-1].content, "output": ""}


class SFTRow(PromptRow):
    """A prompt and the reply to imitate."""

    completion: tuple[Message, ...] = Field(min_length=1)

    def paper_form(self) -> dict[str, object]:
        return {"input": self.prompt[-1].content, "output": self.completion[-1].content}


class RewardRow(SFTRow):
    """A prompt, a reply and its reward."""

    value: float = Field(ge=0, le=10, allow_inf_nan=False)
    """The combined reward, on 0..10."""
    values: dict[str, float] = Field(default={})
    """The vector: by dimension, normalised to 0..1."""

    @field_validator("values")
    @classmethod
    def _finite(cls, values: dict[str, float]) -> dict[str, float]:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"not a finite number: {', '.join(bad)}")
        return values

    def paper_form(self) -> dict[str, object]:
        return super().paper_form() | {"value": self.value}


Row = TypeVar("Row", bound=PromptRow)


def sft_rows(episode: Episode, seats: Sequence[Seat] = (0, 1), *, profile: str | None = None) -> Iterator[SFTRow]:
    """A row per utterance of `seats`. `profile` renders with another prompt profile than the episode's own."""
    for turn, place in _places(episode, seats, profile):
        yield SFTRow(**dict(place), completion=_completion(turn))


def prompt_rows(episode: Episode, seats: Sequence[Seat] = (0, 1), *, profile: str | None = None) -> Iterator[PromptRow]:
    """A row per utterance of `seats`: its prompt only."""
    for _, place in _places(episode, seats, profile):
        yield place


def reward_rows(
    episode: Episode, rewards: Iterable[UtteranceReward], *, profile: str | None = None
) -> Iterator[RewardRow]:
    """A row per rewarded utterance, in turn order.

    Raises:
        DataError: A reward belongs to another episode, or to a turn that is no utterance of its seat.
    """
    by_turn = {reward.turn: reward for reward in rewards}
    spoken = {turn.index: turn.seat for turn in (*episode.utterances(0), *episode.utterances(1))}
    for reward in by_turn.values():
        if reward.episode_id != episode.id or spoken.get(reward.turn) != reward.seat:
            raise DataError(
                f"reward of episode {reward.episode_id}, turn {reward.turn}, seat {reward.seat} "
                f"fits no utterance of episode {episode.id}"
            )
    for turn, place in _places(episode, (0, 1), profile):
        if turn.index in by_turn:
            reward = by_turn[turn.index]
            yield RewardRow(**dict(place), completion=_completion(turn), value=reward.reward, values=reward.normalised)


def _places(episode: Episode, seats: Sequence[Seat], profile: str | None) -> Iterator[tuple[Turn, PromptRow]]:
    """Each utterance of `seats` with its prompt."""
    for turn in episode.turns:
        if turn.seat in seats and turn.action.action_type != "none":
            seen = episode.turns[: turn.index]
            text = agent_prompt(episode.match, seen, turn.seat, profile=profile or episode.prompt_profile)
            yield (
                turn,
                PromptRow(
                    prompt=(Message(role="user", content=text),),
                    episode_id=episode.id,
                    scenario_id=episode.match.scenario.id,
                    turn=turn.index,
                    seat=turn.seat,
                ),
            )


def _completion(turn: Turn) -> tuple[Message, ...]:
    return (Message(role="assistant", content=turn.action.to_json()),)


# --- files ---------------------------------------------------------------------------------------------------------


def write_rows(rows: Iterable[PromptRow], path: Path) -> int:
    """Write rows as JSON lines; the file appears only when it is whole. Returns the number of rows."""
    return write_lines(path, (row.model_dump_json() + "\n" for row in rows))


def write_paper_rows(rows: Iterable[PromptRow], path: Path) -> int:
    """Write rows as the paper's code does: one JSON array of `input`, `output` and, for rewards, `value`."""
    return write_json_array((row.paper_form() for row in rows), path)


def write_json_array(items: Iterable[Mapping[str, object]], path: Path) -> int:
    """Write objects as one JSON array, one at a time; the file appears only when it is whole. Returns their number."""
    count = 0

    def pieces() -> Iterator[str]:
        nonlocal count
        yield "["
        for item in items:
            yield (",\n" if count else "\n") + json.dumps(item, ensure_ascii=False)
            count += 1
        yield "\n]\n"

    write_lines(path, pieces())
    return count


def write_provenance(folder: Path, **known: str | None) -> None:
    """Note beside rows who judged and annotated them, for model cards; what is None is left out."""
    people = {role: name for role, name in known.items() if name is not None}
    write_text(folder / "provenance.json", json.dumps(people, indent=1, ensure_ascii=False) + "\n")


def read_rows(
    cls: type[Row], path: Path, *, on_bad: Literal["raise", "skip"] = "raise", bad: list[str] | None = None
) -> Iterator[Row]:
    """Rows of a JSON-lines file, one at a time; blank lines are passed over.

    Args:
        cls: What the rows must be. Fields of a richer row (a `RewardRow` read as an `SFTRow`) are dropped.
        on_bad: Whether a bad line stops the reading or is left out.
        bad: Collects what was wrong with each line left out.

    Raises:
        DataError: The file cannot be read, holds no row, or has a bad line; named with its number.
    """
    count = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = _row(cls, line, f"{path}:{number}")
                except DataError as error:
                    if on_bad == "raise":
                        raise
                    if bad is not None:
                        bad.append(str(error))
                    continue
                count += 1
                yield row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not count:
        raise DataError(f"{path}: no rows in it")


def _row(cls: type[Row], line: str, where: str) -> Row:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        torn = "" if line.endswith("\n") else ", the line is torn"
        raise DataError(f"{where}: not JSON ({error.msg}{torn})") from error
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(data).__name__}")
    known = RewardRow.model_fields
    try:
        return cls.model_validate({k: v for k, v in data.items() if k in cls.model_fields or k not in known})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.60})"
        raise DataError(f"{where}: field {field}: {first['msg']}{found}") from error


# --- which episodes ------------------------------------------------------------------------------------------------


class CloningFilter(Config):
    """Which agents SFT imitates, as in SOTOPIA-pi (arXiv 2403.08715, section 3.2). By default everybody."""

    model: str | None = None
    """Only episodes in which both agents are this model."""
    goal_above: float | None = None
    """Only agents whose goal score is greater than this."""
    best_per_scenario: int | None = Field(default=None, ge=1)
    """Only so many episodes per scenario and seat, those with the highest goal score."""


class Judged(Record):
    """An episode's id and what the filter decides by, small enough to hold for every episode."""

    episode_id: str
    scenario_id: str
    models: tuple[str, str]
    goal: tuple[float | None, float | None]
    """By seat, None where no judge gave a score."""

    @classmethod
    def of(cls, episode: Episode, rating: Rating | None) -> Self:
        goal = (None, None) if rating is None else (rating.points(0).get("goal"), rating.points(1).get("goal"))
        models = (episode.agents[0].model, episode.agents[1].model)
        return cls(episode_id=episode.id, scenario_id=episode.match.scenario.id, models=models, goal=goal)


class Selection(Record):
    """What a filter kept, and how many agents it left out for each reason."""

    seats: dict[str, tuple[Seat, ...]]
    """Seats to imitate by episode id."""
    left_out: dict[str, int]
    """Agents (two per episode) by reason."""


def select_for_cloning(judged: Iterable[Judged], config: CloningFilter) -> Selection:
    """Choose which agents to imitate; nothing is dropped without being counted."""
    left_out: dict[str, int] = {}
    kept: dict[tuple[str, Seat], list[Judged]] = {}
    seats: tuple[Seat, Seat] = (0, 1)
    for entry in judged:
        for seat in seats:
            reason = _reason_against(entry, seat, config)
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                kept.setdefault((entry.scenario_id, seat), []).append(entry)
    chosen: dict[str, list[Seat]] = {}
    for (_, seat), entries in kept.items():
        best = entries
        if config.best_per_scenario is not None:
            best = sorted(entries, key=lambda e: (-(e.goal[seat] or 0.0), e.episode_id))[: config.best_per_scenario]
            if len(best) < len(entries):
                reason = "not among the best of its scenario"
                left_out[reason] = left_out.get(reason, 0) + len(entries) - len(best)
        for entry in best:
            chosen.setdefault(entry.episode_id, []).append(seat)
    return Selection(seats={key: tuple(sorted(value)) for key, value in chosen.items()}, left_out=left_out)


def _reason_against(entry: Judged, seat: Seat, config: CloningFilter) -> str:
    goal = entry.goal[seat]
    if config.model is not None and entry.models != (config.model, config.model):
        return "not both agents are the chosen model"
    if goal is None and (config.goal_above is not None or config.best_per_scenario is not None):
        return "no goal score"
    if goal is not None and config.goal_above is not None and goal <= config.goal_above:
        return "goal score too low"
    return ""


class SplitConfig(Config):
    """How rows are divided into train and validation."""

    by: Literal["episode", "scenario"] = "episode"
    """What never stands on both sides."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Of the episodes (or scenarios) held back, in expectation."""
    seed: int = 0


def side_of(row: PromptRow, config: SplitConfig) -> Literal["train", "validation"]:
    """On which side a row belongs: a pure function of its group's id and the seed, so that rows may stream."""
    group = row.episode_id if config.by == "episode" else row.scenario_id
    digest = hashlib.sha256(f"{config.seed}/{group}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if share < config.validation_fraction else "train"


def split_rows(rows: Callable[[], Iterable[Row]], config: SplitConfig) -> tuple[Iterator[Row], Iterator[Row]]:
    """Train and validation rows, lazily; `rows` is called once for each side."""
    train = (row for row in rows() if side_of(row, config) == "train")
    validation = (row for row in rows() if side_of(row, config) == "validation")
    return train, validation


def check_leaks(
    train: Iterable[PromptRow], validation: Iterable[PromptRow], *, by: Literal["episode", "scenario"] = "episode"
) -> None:
    """Make sure that no episode (or scenario) stands on both sides. Holds ids only.

    Raises:
        DataError: Some do; the first few are named.
    """
    key: Mapping[str, Callable[[PromptRow], str]] = {
        "episode": lambda row: row.episode_id,
        "scenario": lambda row: row.scenario_id,
    }
    shared = {key[by](row) for row in train} & {key[by](row) for row in validation}
    if shared:
        names = ", ".join(sorted(shared)[:3]) + (", …" if len(shared) > 3 else "")
        raise DataError(f"{len(shared)} {by}s are in both train and validation rows: {names}; split by {by}")
