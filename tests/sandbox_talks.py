"""Conversations in the offline world for its tests: played by scripted people, or written out by hand."""

from __future__ import annotations

import asyncio
from functools import lru_cache

from sotopia_rl import sandbox
from sotopia_rl.episode import Action, AgentSpec, Episode, Match, Sampling, Turn
from sotopia_rl.models import ChatModel, Message
from sotopia_rl.simulate import Pairing, SimulateConfig, play


@lru_cache(maxsize=4096)
def episode(match: Match, first: str, second: str, profile: str = "compact") -> Episode:
    pairing = Pairing(match, (AgentSpec(model=f"scripted/{first}"), AgentSpec(model=f"scripted/{second}")))
    models = (sandbox.SCRIPTED[first](), sandbox.SCRIPTED[second]())
    config = SimulateConfig(prompt_profile=profile, max_turns=12)
    return asyncio.run(play(pairing, models, tag="test", config=config))


def sample(count: int = 40) -> list[Episode]:
    """Episodes of every family and temperament."""
    names = list(sandbox.TEMPERAMENTS)
    matches = sandbox.matches("train", count)
    return [episode(m, names[i % 7], names[(i * 3 + i // 7) % 7]) for i, m in enumerate(matches)]


def match_where(family: str, role: str = "") -> Match:
    """A training match of a family in which seat 0 has this role."""
    found = sandbox.matches("train", 20, families=[family])
    return next(m for m in found if role in ("", sandbox.sides(m)[0].role))


def talk(*lines: str) -> tuple[Turn, ...]:
    """Turns from lines: speech, or `leave`, or nothing for a silent turn."""
    return tuple(turn(index, line) for index, line in enumerate(lines))


def turn(index: int, line: str) -> Turn:
    action = (
        Action(action_type="leave")
        if line == "leave"
        else Action(action_type="speak", argument=line)
        if line
        else Action(action_type="none")
    )
    return Turn(index=index, seat=0 if index % 2 == 0 else 1, action=action)


def asked(model: ChatModel, prompt: str, *, seed: int = 0) -> str:
    """What a model answers to one user message."""
    return asyncio.run(model.complete([Message(role="user", content=prompt)], Sampling(), seed=seed)).text
