"""The engine as PettingZoo environments, for code that wants `reset` and `step` instead of `simulate`.

`SotopiaParallelEnv` steps both agents at once, the one who waits with the action `none`; `SotopiaAECEnv` steps
whoever acts. Turns, endings and texts are `simulate.py`'s and `observe.py`'s own: an agent that answers the
observed prompts makes the same episode here as there. An agent is called `agent_0` or `agent_1`, by its seat.

Importing this module without pettingzoo raises `MissingExtraError`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sotopia_rl.episode import ACTION_TYPES, Action, EndReason, Match, Seat, Turn, sha256_text
from sotopia_rl.errors import MissingExtraError
from sotopia_rl.observe import action_text, agent_prompt
from sotopia_rl.simulate import SimulateConfig, acting_seat, end_reason, parse_action

try:
    from gymnasium import spaces
    from pettingzoo import AECEnv, ParallelEnv
except ImportError as error:
    raise MissingExtraError("pettingzoo", "pettingzoo") from error

AGENTS = ("agent_0", "agent_1")
"""By seat."""

MAX_TEXT = 10_000_000
"""Characters an observation or argument may have; the spaces must state a bound."""

AgentAction: TypeAlias = Action | Mapping[str, Any]
"""An `Action`, or a mapping with `action_type` (its index in `ACTION_TYPES`, or its name) and `argument`."""
Observation: TypeAlias = dict[str, Any]
"""`text`: the prompt that the engine would send. `turn`: its number. `action_mask`: [5] 1 where a type is allowed."""
RewardFunction: TypeAlias = Callable[[Match, tuple[Turn, ...]], tuple[float, float]]
"""From a finished conversation to the rewards of both seats."""


class AnyText(spaces.Text):  # type: ignore[misc]
    """Any string at all; gymnasium's own text space knows a fixed alphabet only. Samples are short."""

    def __init__(self) -> None:
        super().__init__(MAX_TEXT, min_length=0)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(1, 40)), None)
        return str(super().sample(mask, probability))


class ActionSpace(spaces.Dict):  # type: ignore[misc]
    """SOTOPIA's five actions with their argument; `sample` takes the observation's `action_mask`."""

    def __init__(self) -> None:
        super().__init__({"action_type": spaces.Discrete(len(ACTION_TYPES)), "argument": AnyText()})

    def sample(self, mask: NDArray[np.int8] | None = None) -> dict[str, Any]:
        return {
            "action_type": int(self["action_type"].sample(mask=mask)),
            "argument": self["argument"].sample(),
        }


class _Conversation:
    """One match being played; what both environments share."""

    def __init__(self, match: Match, config: SimulateConfig) -> None:
        self.match = match
        self.config = config
        self.turns: tuple[Turn, ...] = ()

    @property
    def seat(self) -> Seat:
        """Who acts now."""
        return acting_seat(len(self.turns))

    @property
    def end_reason(self) -> EndReason | None:
        return end_reason([turn.action for turn in self.turns], self.config)

    def observation(self, seat: Seat) -> Observation:
        mask = np.ones(len(ACTION_TYPES), dtype=np.int8)
        if seat != self.seat or self.end_reason is not None:
            mask = np.array([name == "none" for name in ACTION_TYPES], dtype=np.int8)
        return {"text": self._prompt(seat), "turn": len(self.turns), "action_mask": mask}

    def act(self, action: Action) -> None:
        """Append the acting agent's turn."""
        index, seat = len(self.turns), self.seat
        prompt_sha256 = sha256_text(self._prompt(seat))
        turn = Turn(index=index, seat=seat, action=action, reply=action.to_json(), prompt_sha256=prompt_sha256)
        self.turns = (*self.turns, turn)

    def transcript(self) -> str:
        """For people."""
        names = [character.name for character in self.match.characters]
        return "\n".join(f"{names[turn.seat]} {action_text(turn.action)}" for turn in self.turns)

    def _prompt(self, seat: Seat) -> str:
        return agent_prompt(self.match, self.turns, seat, profile=self.config.prompt_profile)


class _Sotopia:
    """Set-up, spaces and rewards, the same for both kinds of environment.

    Args:
        matches: Reset plays one of them: the one whose id is `options["match"]`, or one drawn by `seed`.
        config: The engine's rules and prompt profile.
        reward: Called once, when a conversation is over. Without it every reward is 0.
    """

    metadata: dict[str, Any] = {"name": "sotopia_v0", "render_modes": ["ansi"], "is_parallelizable": True}  # noqa: RUF012
    render_mode = "ansi"

    def __init__(
        self,
        matches: Sequence[Match],
        *,
        config: SimulateConfig | None = None,
        reward: RewardFunction | None = None,
    ) -> None:
        if not matches:
            raise ValueError("an environment needs at least one match")
        self.matches = tuple(matches)
        self.config = config or SimulateConfig()
        self.reward = reward
        self.possible_agents = list(AGENTS)
        self.agents: list[str] = []
        self.conversation = _Conversation(self.matches[0], self.config)
        self.action_spaces = {agent: ActionSpace() for agent in AGENTS}
        self.observation_spaces = {
            agent: spaces.Dict(
                {
                    "text": AnyText(),
                    "turn": spaces.Discrete(self.config.max_turns + 1),
                    "action_mask": spaces.MultiBinary(len(ACTION_TYPES)),
                }
            )
            for agent in AGENTS
        }
        self._random = random.Random()

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return self.action_spaces[agent]

    def render(self) -> str:
        """The conversation so far, one line per turn."""
        return self.conversation.transcript()

    def close(self) -> None:
        """Nothing is held open."""

    def _begin(self, seed: int | None, options: Mapping[str, Any] | None) -> None:
        if seed is not None:
            self._random = random.Random(seed)
        wanted = (options or {}).get("match")
        if wanted is None:
            match = self._random.choice(self.matches)
        else:
            found = [m for m in self.matches if m.id == wanted]
            if not found:
                raise ValueError(f"no match has the id {wanted!r}")
            match = found[0]
        self.conversation = _Conversation(match, self.config)
        self.agents = list(AGENTS)

    def _rewards(self) -> dict[str, float]:
        if self.reward is None or self.conversation.end_reason is None:
            return dict.fromkeys(AGENTS, 0.0)
        rewards = self.reward(self.conversation.match, self.conversation.turns)
        return dict(zip(AGENTS, rewards, strict=True))

    def _ended(self) -> tuple[bool, bool]:
        """(terminated, truncated)."""
        reason = self.conversation.end_reason
        return reason in ("left", "stale"), reason == "turn_limit"

    def _infos(self) -> dict[str, dict[str, Any]]:
        shared = {"match": self.conversation.match.id, "end_reason": self.conversation.end_reason}
        return {agent: dict(shared) for agent in AGENTS}


class SotopiaParallelEnv(_Sotopia, ParallelEnv[str, Observation, AgentAction]):  # type: ignore[misc]
    """Both agents step together; only the acting agent's action counts, the other's must be `none` or absent."""

    def reset(
        self, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Observation], dict[str, dict[str, Any]]]:
        self._begin(seed, options)
        return self._observations(), self._infos()

    def step(
        self, actions: Mapping[str, AgentAction]
    ) -> tuple[dict[str, Observation], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """One turn.

        Raises:
            ValueError: The episode is over, the acting agent gives no action, an action is malformed, or the
                agent who waits does anything but `none`.
        """
        if not self.agents:
            raise ValueError("the episode is over; call reset()")
        acting = AGENTS[self.conversation.seat]
        for agent, action in actions.items():
            if agent != acting and read_action(action).action_type != "none":
                raise ValueError(f"{agent} waits at turn {len(self.conversation.turns)}; its action can only be none")
        if acting not in actions:
            raise ValueError(f"{acting} acts at turn {len(self.conversation.turns)}, and gave no action")
        self.conversation.act(read_action(actions[acting]))
        terminated, truncated = self._ended()
        if terminated or truncated:
            self.agents = []
        return (
            self._observations(),
            self._rewards(),
            dict.fromkeys(AGENTS, terminated),
            dict.fromkeys(AGENTS, truncated),
            self._infos(),
        )

    def _observations(self) -> dict[str, Observation]:
        return {AGENTS[0]: self.conversation.observation(0), AGENTS[1]: self.conversation.observation(1)}


class SotopiaAECEnv(_Sotopia, AECEnv[str, Observation, AgentAction]):  # type: ignore[misc]
    """One agent at a time, in PettingZoo's agent-environment cycle."""

    def reset(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> None:
        self._begin(seed, options)
        self.rewards = dict.fromkeys(AGENTS, 0.0)
        self._cumulative_rewards = dict.fromkeys(AGENTS, 0.0)
        self.terminations = dict.fromkeys(AGENTS, False)
        self.truncations = dict.fromkeys(AGENTS, False)
        self.infos = self._infos()
        self.agent_selection = AGENTS[0]

    def observe(self, agent: str) -> Observation:
        return self.conversation.observation(0 if agent == AGENTS[0] else 1)

    def step(self, action: AgentAction | None) -> None:
        """The selected agent's turn; None once it is told that the episode is over.

        Raises:
            ValueError: The action is malformed, or there is none where one is due.
        """
        agent = self.agent_selection
        if self.terminations[agent] or self.truncations[agent]:
            self._was_dead_step(action)
            return
        if action is None:
            raise ValueError(f"{agent} acts at turn {len(self.conversation.turns)}, and gave no action")
        self._cumulative_rewards[agent] = 0.0
        self.conversation.act(read_action(action))
        terminated, truncated = self._ended()
        self.rewards = self._rewards()
        self.terminations = dict.fromkeys(AGENTS, terminated)
        self.truncations = dict.fromkeys(AGENTS, truncated)
        self.infos = self._infos()
        self.agent_selection = AGENTS[self.conversation.seat]
        self._accumulate_rewards()


def read_action(value: AgentAction) -> Action:
    """An action as a record, under the rules for an agent's reply in `simulate.parse_action`.

    Raises:
        ValueError: It is malformed.
    """
    if isinstance(value, Action):
        return parse_action(value.to_json())
    given = dict(value)
    kind = given.get("action_type")
    if isinstance(kind, int | np.integer):
        if not 0 <= kind < len(ACTION_TYPES):
            raise ValueError(f"action_type {kind} is not an index into {ACTION_TYPES}")
        given["action_type"] = ACTION_TYPES[int(kind)]
    return parse_action(json.dumps(given, ensure_ascii=False))
