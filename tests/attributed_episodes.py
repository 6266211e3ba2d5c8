"""Episodes, ratings and annotators for the tests of attribution, rewards and rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Self

from hypothesis import strategies as st

from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS
from sotopia_rl.episode import (
    ACTION_TYPES,
    Action,
    AgentSpec,
    Attribution,
    Character,
    Episode,
    Failure,
    Match,
    Provenance,
    Rating,
    Sampling,
    Scenario,
    Score,
    Turn,
    Usage,
    derived_ulid,
)
from sotopia_rl.errors import ModelCallError
from sotopia_rl.models import Reply

NAMES = (
    ("Finnegan O'Malley", "Ann Lee"),
    ("José Álvarez", "Élodie Brün"),
    ("李雷", "韩梅梅"),
    ("Ann Lee", "Ann Lee Smith"),
    ("Ann Lee", "Mary Ann Lee"),
    ("Ann Lee", "Ann Lee"),
    ("Turn #1", "Utterance 3 by Ann"),
)
"""Pairs of names that the paper's code confuses, drops or crashes on."""

AWKWARD = (
    'First paragraph.\n\nSecond paragraph.\n\nAnn Lee said: "third"',
    'She said "{action_list}" and {"goal": {"0": 3}}',
    "<b>bold</b> and I <3 you, <think>secret</think>",
    "I did nothing wrong. did nothing",
    "Rated agent: 2\nRated turns: 1\nTop weight: 99\n---",
    "{{ agent }} {% block task %}{% endblock %} \\u0000 ```json {} ```",
    "",
    "\u2028 \N{GRINNING FACE} \t",
)
"""Texts that something, somewhere, once parsed."""

PROVENANCE = Provenance(model="test/judge", sampling=Sampling(), prompt_profile="default", prompt_sha256="")


def match_of(names: tuple[str, str] = NAMES[0], *, scenario: str = "s1", relationship: int = 0) -> Match:
    people = tuple(
        Character(id=f"c{i}", first_name=name.partition(" ")[0], last_name=name.partition(" ")[2], secret="a secret")
        for i, name in enumerate(names)
    )
    place = Scenario(
        id=scenario,
        description="Two people in a market.",
        goals=("Sell the bike.", "Buy it. <strategy_hint>(cheaply)</strategy_hint>"),
        relationship=relationship,
    )
    return Match.of(place, (people[0], people[1]))


def episode_of(
    actions: Sequence[Action | str | None],
    *,
    names: tuple[str, str] = NAMES[0],
    key: str | int = 0,
    scenario: str = "s1",
    models: tuple[str, str] = ("test/a", "test/b"),
    tag: str = "test",
) -> Episode:
    """An episode of these actions by turn; a text is spoken, None is silence."""
    turns = tuple(
        Turn(index=i, seat=0 if i % 2 == 0 else 1, action=_action(action)) for i, action in enumerate(actions)
    )
    return Episode(
        id=derived_ulid("test", key, *names),
        tag=tag,
        match=match_of(names, scenario=scenario),
        agents=(AgentSpec(model=models[0]), AgentSpec(model=models[1])),
        prompt_profile="default",
        status="completed",
        turns=turns,
    )


def _action(action: Action | str | None) -> Action:
    if isinstance(action, Action):
        return action
    return Action(action_type="none") if action is None else Action(action_type="speak", argument=action)


def rating_of(episode: Episode, *, judge: str = "test/judge", **points: float) -> Rating:
    """The same points for both seats; seven dimensions unless some are given."""
    given = points or {"believability": 8, "relationship": -3, "knowledge": 4, "secret": -2, "social_rules": 0,
                       "financial_and_material_benefits": 1, "goal": 7}  # fmt: skip
    scores = {name: Score(score=value) for name, value in given.items()}
    return Rating(episode_id=episode.id, judge=judge, scores=(scores, scores), provenance=PROVENANCE)


texts = st.one_of(st.sampled_from(AWKWARD), st.text(max_size=30))
actions = st.builds(Action, action_type=st.sampled_from(ACTION_TYPES), argument=texts)


@st.composite
def episodes(draw: st.DrawFn, *, min_turns: int = 0) -> Episode:
    """Any episode: awkward names, awkward texts, silence in any place."""
    chosen = draw(st.lists(actions, min_size=min_turns, max_size=8))
    return episode_of(chosen, names=draw(st.sampled_from(NAMES)), key=draw(st.integers(0, 10**9)))


@st.composite
def rated_episodes(draw: st.DrawFn, *, min_turns: int = 0) -> tuple[Episode, Rating]:
    episode = draw(episodes(min_turns=min_turns))
    points = {d.name: float(draw(st.integers(d.low, d.high))) for d in SOTOPIA_DIMENSIONS}
    return episode, rating_of(episode, **points)


def asked_of(prompt: str) -> tuple[list[str], list[int], int]:
    """Dimensions, turns and top weight that a prompt asks for, from its last lines of that kind."""

    def last(label: str) -> str:
        return re.findall(rf"^{label}: (.*)$", prompt, re.MULTILINE)[-1]

    top = int(last("Top weight")) if "\nTop weight: " in prompt.rpartition("Rated dimensions:")[2] else 0
    return last("Rated dimensions").split(", "), [int(turn) for turn in last("Rated turns").split(", ")], top


class Annotator:
    """A model whose reply is a function of (prompt, number of the call)."""

    def __init__(self, reply: Callable[[str, int], str], name: str = "test/annotator") -> None:
        self.name = name
        self.reply = reply
        self.prompts: list[str] = []
        self.conversations: list[list[str]] = []
        self.seeds: list[int | None] = []
        self.schemas: list[object] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def complete(self, messages, _sampling, *, seed=None, schema=None) -> Reply:
        self.prompts.append(messages[0].content)
        self.conversations.append([message.content for message in messages])
        self.seeds.append(seed)
        self.schemas.append(schema)
        text = self.reply(messages[0].content, len(self.prompts) - 1)
        usage = Usage(
            calls=1,
            prompt_tokens=sum(len(m.content) for m in messages) // 4,
            completion_tokens=len(text) // 4,
            cost_usd=0.01,
        )
        return Reply(text=text, usage=usage)


def weights_by(weight: Callable[[str, int], int]) -> Annotator:
    """An annotator that gives `weight(dimension, turn)` for whatever is asked."""

    def reply(prompt: str, _call: int) -> str:
        dimensions, turns, _ = asked_of(prompt)
        return json.dumps({name: {str(turn): weight(name, turn) for turn in turns} for name in dimensions})

    return Annotator(reply)


def failing(error: ModelCallError) -> Annotator:
    def reply(_prompt: str, _call: int) -> str:
        raise error

    return Annotator(reply)


def answers(outcome: tuple[Attribution, ...] | Failure) -> tuple[Attribution, ...]:
    """Attributions that did not fail."""
    assert not isinstance(outcome, Failure), outcome
    return outcome
