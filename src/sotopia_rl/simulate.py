"""The engine: runs one match, and runs many of them, bounded, failures contained.

Round-robin as in SOTOPIA: the agent in seat 0 acts on even turns. An episode ends when somebody leaves,
when it is stale, or at the turn limit. What an agent sees is rendered in `observe.py`; what it says is
read here, strictly. A call that fails ends its own episode with that failure and touches no other.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from pydantic import Field

from sotopia_rl import __version__
from sotopia_rl.config import Config
from sotopia_rl.episode import (
    ACTION_TYPES,
    Action,
    ActionType,
    AgentSpec,
    EndReason,
    Episode,
    EpisodeStatus,
    Failure,
    Match,
    Seat,
    Turn,
    derived_ulid,
    sha256_text,
)
from sotopia_rl.errors import BudgetError, EndpointDownError, ModelCallError
from sotopia_rl.llm.extract import extract_json
from sotopia_rl.llm.structured import UnusableReply, ask
from sotopia_rl.models import ChatModel, JsonSchema
from sotopia_rl.observe import agent_prompt
from sotopia_rl.work import bounded, failure_of

ACTION_SCHEMA: JsonSchema = {
    "title": "AgentAction",
    "type": "object",
    "properties": {
        "action_type": {"type": "string", "enum": list(ACTION_TYPES)},
        "argument": {"type": "string"},
    },
    "required": ["action_type", "argument"],
    "additionalProperties": False,
}
"""What an agent's reply must look like, for models that can be constrained."""


class SimulateConfig(Config):
    """How matches are played."""

    prompt_profile: str = Field(default="default")
    """Wording of the agents' prompts: a profile of `observe.PROFILES`."""
    max_turns: int = Field(default=20, gt=0)
    """Turns after which an episode ends."""
    max_silent_turns: int = Field(default=2, ge=0)
    """An episode is stale when more than this many `none` actions come in a row."""
    count_masked_turns: bool = Field(default=False)
    """Judge staleness as sotopia 0.1.0rc5 to 0.1.5 do, where the waiting agent's turn counts as `none`."""
    constrain: bool = Field(default=True)
    """Constrain agents' replies to the action's JSON schema, where a model can be."""
    max_attempts: int = Field(default=3, gt=0)
    """Times an agent is asked for an action before its episode fails."""
    episode_timeout_seconds: float = Field(default=1800.0, gt=0)
    """Time one episode may take."""
    concurrency: int = Field(default=64, gt=0)
    """Matches played at once."""
    stop_after_connection_failures: int = Field(default=16, gt=0)
    """Stop the run when this many episodes in a row fail because no endpoint answers."""


@dataclass(frozen=True)
class Pairing:
    """A match and what sits in its two seats."""

    match: Match
    agents: tuple[AgentSpec, AgentSpec]


def episode_id(pairing: Pairing, *, tag: str, config: SimulateConfig) -> str:
    """The id under which this pairing's episode is stored; the same call finds it again."""
    rules = config.model_dump(
        include={"prompt_profile", "max_turns", "max_silent_turns", "count_masked_turns", "constrain"}
    )
    agents = [agent.model_dump_json() for agent in pairing.agents]
    return derived_ulid("episode", tag, pairing.match.id, *agents, json.dumps(rules, sort_keys=True))


def parse_action(text: str) -> Action:
    """Read an agent's reply: a JSON object with exactly `action_type` and `argument`.

    Raises:
        UnusableReply: It is anything else; the message says what is wrong.
    """
    value = extract_json(text)
    if not isinstance(value, dict):
        raise UnusableReply(f"expected a JSON object, found {type(value).__name__}")
    if set(value) != {"action_type", "argument"}:
        raise UnusableReply(f"expected exactly the keys action_type and argument, found {sorted(value)}")
    kind, argument = value["action_type"], value["argument"]
    if kind not in ACTION_TYPES:
        raise UnusableReply(f"action_type must be one of {', '.join(ACTION_TYPES)}; found {kind!r}")
    if not isinstance(argument, str):
        raise UnusableReply(f"argument must be a string, found {type(argument).__name__}")
    if kind not in ("none", "leave") and not argument.strip():
        raise UnusableReply(f"the argument of {kind} is empty")
    return Action(action_type=cast(ActionType, kind), argument=argument)


def acting_seat(turn_index: int) -> Seat:
    """Who acts at a turn."""
    return 0 if turn_index % 2 == 0 else 1


def end_reason(actions: Sequence[Action], config: SimulateConfig) -> EndReason | None:
    """Why an episode with these actions, one per turn, is over; None while it goes on."""
    if actions and actions[-1].action_type == "leave":
        return "left"
    if _trailing_silence(actions, config) > config.max_silent_turns:
        return "stale"
    return "turn_limit" if len(actions) >= config.max_turns else None


def _trailing_silence(actions: Sequence[Action], config: SimulateConfig) -> int:
    """How many `none` in a row end the episode so far."""
    silent = 0
    for index in range(len(actions) - 1, -1, -1):
        is_silent = actions[index].action_type == "none"
        if not config.count_masked_turns:
            if not is_silent:
                return silent
            silent += 1
            continue
        # Within a turn the old engines list agent 1's action, then agent 2's; whoever waits does `none`.
        for seat in (1, 0):
            if acting_seat(index) == seat and not is_silent:
                return silent
            silent += 1
    return silent


def turn_seed(match: Match, turn_index: int) -> int:
    """Sampling seed of a turn, below 2^31; equal for every system that plays this match."""
    digest = hashlib.sha256(f"{match.id}/{match.seed}/{turn_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


async def play(pairing: Pairing, models: tuple[ChatModel, ChatModel], *, tag: str, config: SimulateConfig) -> Episode:
    """Play one match to its end. Whatever goes wrong with a model is in the episode's status and failure."""
    return (await _play(pairing, models, tag, config))[0]


async def _play(
    pairing: Pairing, models: tuple[ChatModel, ChatModel], tag: str, config: SimulateConfig
) -> tuple[Episode, ModelCallError | None]:
    """The episode, and the error that ended it."""
    turns: list[Turn] = []
    status: EpisodeStatus = "completed"
    failure: Failure | None = None
    broke: ModelCallError | None = None
    try:
        async with asyncio.timeout(config.episode_timeout_seconds):
            await _converse(pairing, models, config, turns)
    except TimeoutError:
        status = "timed_out"
        message = f"the episode took longer than {config.episode_timeout_seconds:g} s"
        failure = Failure(kind="timeout", message=message, turn=len(turns))
    except ModelCallError as error:
        status = "cancelled" if isinstance(error, BudgetError) else "agent_failed"
        failure, broke = failure_of(error, turn=len(turns)), error
    episode = Episode(
        id=episode_id(pairing, tag=tag, config=config),
        tag=tag,
        match=pairing.match,
        agents=pairing.agents,
        prompt_profile=config.prompt_profile,
        max_turns=config.max_turns,
        status=status,
        failure=failure,
        end_reason=end_reason([t.action for t in turns], config) if failure is None else None,
        turns=tuple(turns),
        package_version=__version__,
    )
    return episode, broke


async def _converse(
    pairing: Pairing, models: tuple[ChatModel, ChatModel], config: SimulateConfig, turns: list[Turn]
) -> None:
    """Append turns until the episode is over."""
    actions: list[Action] = []
    while end_reason(actions, config) is None:
        index = len(turns)
        seat = acting_seat(index)
        prompt = agent_prompt(pairing.match, turns, seat, profile=config.prompt_profile)
        answer = await ask(
            models[seat],
            prompt,
            parse_action,
            sampling=pairing.agents[seat].sampling,
            seed=turn_seed(pairing.match, index),
            schema=ACTION_SCHEMA if config.constrain else None,
            max_attempts=config.max_attempts,
        )
        actions.append(answer.value)
        turns.append(
            Turn(
                index=index,
                seat=seat,
                action=answer.value,
                reply=answer.text,
                prompt_sha256=sha256_text(prompt),
                attempts=answer.attempts,
                usage=answer.usage,
            )
        )


async def simulate(
    pairings: Iterable[Pairing],
    get_model: Callable[[str], ChatModel],
    *,
    tag: str,
    config: SimulateConfig,
) -> AsyncGenerator[Episode, None]:
    """Play many matches, `config.concurrency` at once; yield each episode as it ends.

    Args:
        pairings: May be long and lazy.
        get_model: From a model string to the open model.

    Raises:
        BudgetError: The spend cap is reached.
        EndpointDownError: An endpoint was given up, or too many episodes in a row found none. What had ended by then
            was yielded; what was under way is not.
    """

    async def one(pairing: Pairing) -> tuple[Episode, ModelCallError | None]:
        models = (get_model(pairing.agents[0].model), get_model(pairing.agents[1].model))
        return await _play(pairing, models, tag, config)

    unreachable = 0
    async with aclosing(bounded(pairings, one, limit=config.concurrency)) as outcomes:
        async for _, outcome in outcomes:
            # `_play` turns every model failure into a status
            episode, broke = cast(tuple[Episode, ModelCallError | None], outcome)
            yield episode
            if isinstance(broke, BudgetError):
                raise broke
            unreachable = unreachable + 1 if broke is not None and broke.kind == "connection" else 0
            if isinstance(broke, EndpointDownError) or (broke and unreachable >= config.stop_after_connection_failures):
                message = f"stopped: {broke}; matches that failed are played again with --retry-failed"
                raise EndpointDownError(message, model=broke.model, kind=broke.kind)
