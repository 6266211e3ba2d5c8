"""SOTOPIA-EVAL: a model rates both agents of an episode on every dimension.

Judging is apart from simulating: an episode can be judged later, again, and by several judges, each giving its
own `Rating`. A reply that is incomplete, ambiguous or out of range is asked for again with all that was wrong
with it; no score is ever made up.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from sotopia_rl.config import Config
from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS, Dimension, judge_schema, load_dimensions
from sotopia_rl.episode import Episode, Failure, Rating, Sampling, Score, canonical_json, sha256_text
from sotopia_rl.errors import DataError
from sotopia_rl.llm.extract import UnusableReply, extract_json
from sotopia_rl.llm.structured import ask
from sotopia_rl.models import ChatModel, JsonSchema
from sotopia_rl.observe import get_profile, judge_prompt
from sotopia_rl.work import bounded

__all__ = [
    "SOTOPIA_DIMENSIONS",
    "Dimension",
    "JudgeConfig",
    "judge_all",
    "judge_episode",
    "judge_schema",
    "judgeable",
    "load_dimensions",
    "parse_scores",
]

Scores = tuple[dict[str, Score], dict[str, Score]]
"""By seat, then by dimension name."""


class JudgeConfig(Config):
    """How episodes are judged."""

    prompt_profile: str = Field(default="default")
    """Wording of the judge's prompt, and the form of reply it asks for: a profile of `observe.PROFILES`."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of the judge; 0 means greedy."""
    max_tokens: int = Field(default=4096, gt=0)
    """Longest reply, in tokens."""
    max_attempts: int = Field(default=3, gt=0)
    """Times a judge is asked before judging an episode fails."""
    dimensions: Path | None = Field(default=None)
    """YAML file of the dimensions to rate; SOTOPIA-EVAL's seven when not given."""
    max_reason_chars: int | None = Field(default=None, gt=0)
    """Longest reasoning per score where the model is constrained to the schema; for small models that ramble."""
    seed: int | None = Field(default=None)
    """Sampling seed of the first attempt."""
    concurrency: int = Field(default=64, gt=0)
    """Episodes judged at once."""

    @field_validator("prompt_profile")
    @classmethod
    def _known_profile(cls, name: str) -> str:
        return get_profile(name).name

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)

    def load_dimensions(self) -> tuple[Dimension, ...]:
        """The dimensions to rate.

        Raises:
            ConfigError: The file of dimensions cannot be used.
        """
        return SOTOPIA_DIMENSIONS if self.dimensions is None else load_dimensions(self.dimensions)

    def key(self) -> str:
        """Hash of the settings; a file of dimensions counts by what it says, not by where it lies."""
        settings = self.model_dump(mode="json", exclude={"concurrency"})
        settings["dimensions"] = [dimension.model_dump() for dimension in self.load_dimensions()]
        return sha256_text(canonical_json(settings))


def judgeable(episode: Episode) -> bool:
    """Whether the conversation came to its end: only such an episode can be judged."""
    return episode.status in ("completed", "judge_failed")


async def judge_episode(episode: Episode, model: ChatModel, config: JudgeConfig) -> Rating:
    """Ask `model` to rate one episode.

    Raises:
        DataError: The conversation never came to its end.
        ReplyError: No attempt gave a usable reply.
        ModelCallError: The model gave no reply at all.
        ConfigError: The file of dimensions cannot be used.
    """
    return await _judge(episode, model, config, config.load_dimensions())


async def judge_all(
    episodes: Iterable[Episode], model: ChatModel, config: JudgeConfig, *, limit: int | None = None
) -> AsyncIterator[tuple[Episode, Rating | Failure]]:
    """Judge many episodes, at most `limit` at once (`config.concurrency` when None); yield each as it ends.

    A model failure becomes the `Failure` of its episode and touches no other; the caller keeps it and may judge
    the episode again. For several judges call this once per judge.

    Args:
        episodes: May be long and lazy; only `judgeable` ones.

    Raises:
        DataError: An episode is not judgeable.
        ConfigError: The file of dimensions cannot be used.
    """
    dimensions = config.load_dimensions()

    async def one(episode: Episode) -> Rating:
        return await _judge(episode, model, config, dimensions)

    async for result in bounded(episodes, one, limit=limit or config.concurrency):
        yield result


async def _judge(episode: Episode, model: ChatModel, config: JudgeConfig, dimensions: Sequence[Dimension]) -> Rating:
    if not judgeable(episode):
        raise DataError(
            f"episode {episode.id} cannot be judged: its status is {episode.status}, "
            f"so the conversation stopped after {len(episode.turns)} turns; simulate it again"
        )
    answer = await ask(
        model,
        judge_prompt(episode.match, episode.turns, profile=config.prompt_profile, dimensions=dimensions),
        lambda text: parse_scores(text, dimensions),
        sampling=config.sampling,
        seed=config.seed,
        schema=_constraint(config, dimensions),
        max_attempts=config.max_attempts,
    )
    return Rating(
        episode_id=episode.id,
        judge=model.name,
        scores=answer.value,
        provenance=answer.provenance(model, config.sampling, config.prompt_profile),
    )


def _constraint(config: JudgeConfig, dimensions: Sequence[Dimension]) -> JsonSchema | None:
    """The schema to constrain the reply with; none for the published prompts, which were sent without."""
    if get_profile(config.prompt_profile).reply_form != "default":
        return None
    return judge_schema(dimensions, max_reason_chars=config.max_reason_chars)


# Reading a reply. Agents and dimensions are found by their keys, never by position, so their order is free.


def parse_scores(text: str, dimensions: Sequence[Dimension]) -> Scores:
    """Read a judge's reply, in our form or in one of the published ones.

    Ours is `{"agent_1": {dimension: {"reasoning", "score"}}, "agent_2": ...}`; SOTOPIA's are
    `{"agent_1_evaluation": {dimension: [reason, score]}, ...}` and `{"evaluations": {"agent_1": ...}}`. A judge
    may mix how a score is written and add keys of its own (a `summary`), which are not read; but nothing may look
    like a third agent, and no agent may be rated twice.

    Raises:
        UnusableReply: Something is missing, ambiguous, not a whole number or out of range; the message names all
            of it.
    """
    agents = _agents(extract_json(text))
    problems: list[str] = []
    scores: Scores = ({}, {})
    for key, ratings, of_agent in zip(("agent_1", "agent_2"), agents, scores, strict=True):
        for dimension in dimensions:
            try:
                of_agent[dimension.name] = _score(ratings, dimension)
            except UnusableReply as problem:
                problems.append(f"{key}: {problem}")
    if problems:
        raise UnusableReply("; ".join(problems))
    return scores


def _agents(reply: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The two agents' ratings, whichever form they are in."""
    holders = [reply, *([reply["evaluations"]] if "evaluations" in reply else [])]
    found: dict[str, list[object]] = {}
    for holder in holders:
        if not isinstance(holder, dict):
            raise UnusableReply(f"evaluations must be an object, found {_kind(holder)}")
        for key, value in holder.items():
            if key.lower().startswith("agent"):
                found.setdefault(key.removesuffix("_evaluation"), []).append(value)
    stray = sorted(set(found) - {"agent_1", "agent_2"})
    if stray:
        raise UnusableReply(f"there are exactly two agents, agent_1 and agent_2; found {', '.join(stray)} too")
    first, second = (_the_one(key, found.get(key, [])) for key in ("agent_1", "agent_2"))
    return first, second


def _the_one(key: str, values: Sequence[object]) -> Mapping[str, Any]:
    if len(values) != 1:
        raise UnusableReply(f"{key} is {'missing' if not values else 'rated more than once'}")
    if not isinstance(values[0], dict):
        raise UnusableReply(f"{key} must be an object of dimensions, found {_kind(values[0])}")
    return values[0]


def _score(ratings: Mapping[str, Any], dimension: Dimension) -> Score:
    name = dimension.name
    if name not in ratings:
        raise UnusableReply(f"{name} is missing")
    match ratings[name]:
        case [reason, points]:
            pass
        case {"reasoning": reason, "score": points}:
            pass
        case other:
            raise UnusableReply(f"{name} must hold a reasoning and a score, found {_kind(other)}")
    if not isinstance(reason, str):
        raise UnusableReply(f"{name}: the reasoning must be a string, found {_kind(reason)}")
    if not isinstance(points, int) or isinstance(points, bool):
        raise UnusableReply(f"{name}: the score must be an integer, found {points!r:.40}")
    if not dimension.low <= points <= dimension.high:
        raise UnusableReply(f"{name}: score {points} is outside {dimension.low} to {dimension.high}")
    return Score(score=points, reason=reason)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), repr(value)[:40])
