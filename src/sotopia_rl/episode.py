"""The records every stage reads and writes, and nothing else.

A record is frozen, refuses unknown fields, and is keyed by ids: an episode by its ULID, a turn by
(episode id, turn index), an agent by its seat (0 or 1). Names are for display only. Text is rendered
from these records in `observe.py`; no record is ever parsed back from text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sotopia_rl.errors import FailureKind

Seat = Literal[0, 1]
ActionType = Literal["none", "speak", "non-verbal communication", "action", "leave"]
ACTION_TYPES: tuple[ActionType, ...] = get_args(ActionType)
"""SOTOPIA's five actions, in the one order in which prompts list them."""

RELATIONSHIPS = (
    "stranger",
    "know_by_name",
    "acquaintance",
    "friend",
    "romantic_relationship",
    "family_member",
)
"""Relationship types by their number in the SOTOPIA profiles."""

SCHEMA_VERSION = 1
"""Version of the records below, written into every store and file that holds them."""


class Record(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def other(seat: Seat) -> Seat:
    """The partner's seat."""
    return 1 if seat == 0 else 0


_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def derived_ulid(*parts: str | int) -> str:
    """A ULID that is a pure function of `parts`, so that a resumed run finds its own records.

    It has a ULID's form (26 Crockford characters, 128 bits) but its leading bits are a hash, not a time.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()[:16]
    number = int.from_bytes(digest, "big")
    return "".join(_CROCKFORD[(number >> shift) & 31] for shift in range(125, -1, -5))


class Character(Record):
    """Who a person is. Field meanings are those of SOTOPIA's agent profiles."""

    id: str
    first_name: str
    last_name: str
    age: int = Field(default=0, ge=0)
    occupation: str = ""
    gender: str = ""
    gender_pronoun: str = ""
    public_info: str = ""
    big_five: str = ""
    moral_values: tuple[str, ...] = ()
    schwartz_personal_values: tuple[str, ...] = ()
    personality_and_values: str = ""
    decision_making_style: str = ""
    secret: str = ""
    mbti: str = ""

    @property
    def name(self) -> str:
        """Full name, for display and for prompts."""
        return f"{self.first_name} {self.last_name}".strip()


class Scenario(Record):
    """Where two people meet and what each of them wants.

    `description` and `goals` are the published raw texts: they may hold SOTOPIA's viewer and hint tags,
    which `observe.py` resolves for whoever is looking.
    """

    id: str
    codename: str = ""
    source: str = ""
    description: str
    goals: tuple[str, str]
    relationship: int = Field(default=0, ge=0, le=5)
    """Index into `RELATIONSHIPS`."""
    age_constraint: str = ""
    occupation_constraint: str = ""
    agent_constraint: str = ""


class Match(Record):
    """Who meets where, in which seats, with which seed."""

    id: str
    scenario: Scenario
    characters: tuple[Character, Character]
    """By seat: `characters[0]` acts on even turns."""
    seat: Seat = 0
    """The seat of the system under test; the partner has the other one."""
    seed: int = 0

    @classmethod
    def of(cls, scenario: Scenario, characters: tuple[Character, Character], *, seat: Seat = 0, seed: int = 0) -> Self:
        """A match whose id is derived from its content."""
        match_id = derived_ulid("match", scenario.id, characters[0].id, characters[1].id, seat, seed)
        return cls(id=match_id, scenario=scenario, characters=characters, seat=seat, seed=seed)


class Action(Record):
    """One of SOTOPIA's five actions. `argument` is kept exactly as the model wrote it."""

    action_type: ActionType
    argument: str = ""

    def to_json(self) -> str:
        """The canonical reply text for this action; training completions use it."""
        return json.dumps({"action_type": self.action_type, "argument": self.argument}, ensure_ascii=False)


class Sampling(Record):
    """How a model is asked to sample."""

    temperature: float = Field(default=0.7, ge=0)
    """0 means greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, gt=0)


class AgentSpec(Record):
    """What sits in a seat: a model string and how it samples."""

    model: str
    sampling: Sampling = Sampling()


class Usage(Record):
    """What calls to a model took. Adds up with `+`."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    def __add__(self, more: Usage) -> Usage:
        return Usage(
            calls=self.calls + more.calls,
            prompt_tokens=self.prompt_tokens + more.prompt_tokens,
            completion_tokens=self.completion_tokens + more.completion_tokens,
            cost_usd=self.cost_usd + more.cost_usd,
        )


class Provenance(Record):
    """How a model's answer came about, enough to ask the same thing again."""

    model: str
    sampling: Sampling
    prompt_profile: str
    prompt_sha256: str
    """Of the exact prompt of the first attempt."""
    attempts: int = 1
    usage: Usage = Usage()
    package_version: str = ""


class Turn(Record):
    """What the agent in `seat` did at turn `index`, and the reply it came from."""

    index: int = Field(ge=0)
    seat: Seat
    action: Action
    reply: str = ""
    """The model's reply, unchanged; the action is what was read from it."""
    prompt_sha256: str = ""
    """Of the exact prompt text; `observe.agent_prompt` renders it again."""
    attempts: int = 1
    usage: Usage = Usage()


EpisodeStatus = Literal["completed", "agent_failed", "judge_failed", "timed_out", "cancelled"]
EndReason = Literal["left", "stale", "turn_limit"]


class Failure(Record):
    """Why something has no result. A failure is data, never a score."""

    kind: FailureKind
    message: str
    turn: int | None = None
    """Turn at which an episode failed."""
    usage: Usage = Usage()
    """What it took: replies that were refused are paid for."""


class Episode(Record):
    """One conversation, whole or up to the turn at which it failed.

    An unjudged conversation is `completed`: scores live in `Rating` records, so that an episode can be
    judged later, again, and by several judges.
    """

    id: str
    tag: str = Field(min_length=1)
    match: Match
    agents: tuple[AgentSpec, AgentSpec]
    """By seat."""
    prompt_profile: str
    max_turns: int = Field(default=20, gt=0)
    status: EpisodeStatus
    failure: Failure | None = None
    end_reason: EndReason | None = None
    turns: tuple[Turn, ...] = ()
    package_version: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for index, turn in enumerate(self.turns):
            if turn.index != index:
                raise ValueError(f"turn {turn.index} stands at place {index}")
        if (self.status == "completed") != (self.failure is None):
            raise ValueError(f"status {self.status} with failure {self.failure}")
        return self

    def utterances(self, seat: Seat) -> tuple[Turn, ...]:
        """The turns in which `seat` did something; silent (`none`) turns are not utterances."""
        return tuple(t for t in self.turns if t.seat == seat and t.action.action_type != "none")

    @property
    def usage(self) -> Usage:
        """Summed over the turns, the one that failed included."""
        return sum((t.usage for t in self.turns), self.failure.usage if self.failure else Usage())


class Score(Record):
    """One dimension's score, in points, with the judge's reason."""

    score: float
    reason: str = ""


class Rating(Record):
    """What one judge says of one episode: every dimension, both seats."""

    episode_id: str
    judge: str
    """Model string."""
    scores: tuple[dict[str, Score], dict[str, Score]]
    """By seat, then by dimension name."""
    provenance: Provenance

    def points(self, seat: Seat) -> dict[str, float]:
        """Scores of one seat by dimension, in points."""
        return {name: score.score for name, score in self.scores[seat].items()}

    def overall(self, seat: Seat) -> float:
        """SOTOPIA's overall score: the plain mean of the dimensions."""
        points = self.points(seat)
        return sum(points.values()) / len(points)


class UtteranceWeight(Record):
    """How much one utterance contributed, on the method's scale."""

    turn: int = Field(ge=0)
    weight: float
    spread: float | None = None
    """Standard deviation over self-consistency samples, when there were several."""
    reason: str = ""


class Attribution(Record):
    """How much each utterance of one agent contributed to one dimension's score.

    One weight per utterance of the agent (silent turns have none), in turn order.
    """

    episode_id: str
    seat: Seat
    dimension: str
    method: str
    annotator: str
    """Model string."""
    weights: tuple[UtteranceWeight, ...]
    top_weight: Annotated[float, Field(gt=0)] = 3.0
    """The weight that earns the whole score."""
    provenance: Provenance

    def by_turn(self) -> dict[int, float]:
        """Weights keyed by turn index."""
        return {w.turn: w.weight for w in self.weights}


class UtteranceReward(Record):
    """The reward of one utterance: the vector, its normalised form and the scalar made of it."""

    episode_id: str
    turn: int = Field(ge=0)
    seat: Seat
    points: dict[str, float]
    """By dimension, attribution x score, in points."""
    normalised: dict[str, float]
    """By dimension, on 0..1."""
    reward: float
    """The combined scalar, on 0..10."""


def sha256_text(text: str) -> str:
    """Hex digest under which prompts and configs are recorded."""
    return hashlib.sha256(text.encode()).hexdigest()


def canonical_json(value: Mapping[str, object] | list[object]) -> str:
    """JSON with sorted keys and no spaces, for hashing."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
