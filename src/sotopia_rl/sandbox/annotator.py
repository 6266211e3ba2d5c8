"""The scripted annotator: answers the attribution questions of `prompts/attribution_*.jinja` from exact knowledge.

It answers what it is asked, as a perfect reader of that question would: for a direct question the exact
credit, for a counterfactual one the score without the utterance, for one about the words alone only what the
words show. So the benchmark measures the method and not the reader. A noisy one replaces each number, at a
known chance, by any number of the range.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sotopia_rl.episode import Seat, other
from sotopia_rl.sandbox.credit import silent_score, turn_credit
from sotopia_rl.sandbox.language import Act, understand
from sotopia_rl.sandbox.play import Play, outcome_of, partner_asked, points, replay
from sotopia_rl.sandbox.reading import Unreadable, read_observed
from sotopia_rl.sandbox.verdict import DIMENSIONS, LEAK_POINTS, whole

Answers = dict[int, float]
"""By turn index: a share of the top weight (0..1), or points where the question asks for a score."""


@dataclass(frozen=True)
class Question:
    """What an attribution prompt asks, as its literal lines say it."""

    method: str
    online: bool
    seat: Seat
    turns: tuple[int, ...]
    ranges: dict[str, tuple[int, int]]
    """By dimension: least and greatest number of the answer."""
    asks_score: bool


def read_question(prompt: str) -> Question:
    """The question at the end of an attribution prompt.

    Raises:
        Unreadable: One of its lines is missing or not of the known form.
    """
    # The template's own lines come last, so whatever the transcript imitates stands before them.
    rest = prompt[prompt.rfind("\n---\n") :]
    method = _line(rest, "Method", r"\w+(?:-\S+)?").partition("-")[0]
    agent = _line(rest, "Rated agent", "[12]")
    turns = tuple(int(turn) for turn in _line(rest, "Rated turns", r"\d+(?:, \d+)*").split(", "))
    names = _line(rest, "Rated dimensions", r"\S.*").split(", ")
    unknown = [name for name in names if name not in (*DIMENSIONS, "conversation_behaviour")]
    if unknown:
        raise Unreadable(f"no exact knowledge of the dimension {unknown[0]!r}")
    asks_score = "\nTop weight: " not in rest
    if asks_score:
        ranges = {name: _range(rest, name) for name in names}
    else:
        ranges = dict.fromkeys(names, (0, int(_line(rest, "Top weight", r"\d+"))))
    online = "shown up to and including the turn" in prompt.partition("\n")[0]
    return Question(method, online, 0 if agent == "1" else 1, turns, ranges, asks_score)


def _line(rest: str, label: str, form: str) -> str:
    found = re.findall(rf"^{label}: ({form})$", rest, re.MULTILINE)
    if len(found) != 1:
        raise Unreadable(f"the question has {len(found)} lines {label!r} where one is needed")
    return str(found[0])


def _range(rest: str, name: str) -> tuple[int, int]:
    low, high = _line(rest, "Score range", rf"{re.escape(name)} -?\d+ to -?\d+").removeprefix(f"{name} ").split(" to ")
    return int(low), int(high)


def annotate(prompt: str, rng: random.Random, *, noise: float = 0.0) -> str:
    """The reply to an attribution prompt: dimension to turn to whole number."""
    question = read_question(prompt)
    exact = _answers(prompt, question)
    replies = {name: _numbers(question, name, answers, rng, noise) for name, answers in exact.items()}
    return json.dumps({name: {str(turn): number for turn, number in n.items()} for name, n in replies.items()})


def _numbers(question: Question, name: str, exact: Answers, rng: random.Random, noise: float) -> dict[int, int]:
    low, high = question.ranges[name]
    if question.method == "singular":
        key = max(question.turns, key=lambda turn: exact[turn])
        chosen = rng.choice(question.turns) if rng.random() < noise else key
        return {turn: int(turn == chosen) for turn in question.turns}
    scale = 1 if question.asks_score else high
    numbers = {turn: min(high, max(low, whole(value * scale))) for turn, value in exact.items()}
    numbers = {turn: rng.randint(low, high) if rng.random() < noise else n for turn, n in numbers.items()}
    if question.method == "direct_normalised" and not any(numbers.values()):
        # Nothing to share out: the question forbids saying so, and equal shares claim the least.
        return dict.fromkeys(question.turns, 1)
    return numbers


def _answers(prompt: str, question: Question) -> dict[str, Answers]:
    """The exact answers, by dimension."""
    if question.method == "response_only":
        acts = {turn: understand(text) for turn, text in _utterances(prompt, question.turns).items()}
        return {name: {turn: promise(done, name) for turn, done in acts.items()} for name in question.ranges}
    seen = read_observed(prompt)
    wrong = [turn for turn in question.turns if turn >= len(seen.heard) or seen.heard[turn].seat != question.seat]
    if wrong:
        raise Unreadable(f"turn {wrong[0]} is not a turn of agent {question.seat + 1}")
    play = replay(seen.sides, seen.heard)
    readers = {name: _reader(question, name) for name in question.ranges}
    return {name: {turn: knows(play, turn, name) for turn in question.turns} for name, knows in readers.items()}


Reader = Callable[[Play, int, str], float]
"""From a conversation, a turn and a dimension to the answer."""


def _reader(question: Question, dimension: str) -> Reader:
    """Who answers this question. No judge scores conversation behaviour: there, only the words can decide."""
    if dimension == "conversation_behaviour":
        return quality
    if question.method in _READERS:
        return _READERS[question.method]
    return quality if question.online and dimension in _OUTCOMES else turn_credit


def _standing(play: Play, turn: int, dimension: str) -> float:
    """The score of the speaker had the talk ended once the partner had answered this turn."""
    return DIMENSIONS[dimension].score(replay(play.sides, play.heard[: turn + 2]), play.heard[turn].seat)


_OUTCOMES = ("goal", "financial_and_material_benefits")
"""Dimensions that are decided by how the conversation ends."""


def quality(play: Play, turn: int, dimension: str) -> float:
    """How good an utterance was when it was made, 0..1, whatever came of it later."""
    now = play.heard[turn]
    if dimension not in _OUTCOMES:
        return promise(now.acts, dimension)
    if play.sides[now.seat].role == "keeper":
        gave_away = any(act.kind == "tell" and act.topic in ("kept", "hint") for act in now.acts)
        return float(partner_asked(play, turn) and not gave_away)
    if play.sides[now.seat].role == "asker":
        return float(any(act.kind == "ask" and act.topic in ("secret", "hint") for act in now.acts))
    return max((_claim(play, turn, act) for act in now.acts), default=0.0)


def _claim(play: Play, turn: int, act: Act) -> float:
    """What an offer or an acceptance would bring its speaker, as a share of 10 points; nothing if out of reach."""
    seat = play.heard[turn].seat
    stood = play.stood[turn]
    outcome = outcome_of(play.sides[seat], seat, act) if act.kind == "offer" else None
    if act.kind == "accept" and stood:
        outcome = stood.outcome
    if outcome is None or points(play.sides, other(seat), outcome) < 0:
        return 0.0
    return min(1.0, max(0.0, points(play.sides, seat, outcome) / 10))


_READERS: dict[str, Reader] = {
    "goal_progress": _standing,
    "counterfactual": silent_score,
    "utterance_quality": quality,
}
"""By method, where the exact credit is not what is asked for."""

_HARM: dict[str, Callable[[Act], bool]] = {
    "secret": lambda act: act.kind == "tell" and act.topic in LEAK_POINTS,
    "social_rules": lambda act: act.kind in ("insult", "threat"),
    "believability": lambda act: act.kind == "unknown",
}
_USE: dict[str, dict[str, float]] = {
    "relationship": {"courtesy": 1.0, "accept": 0.7, "object": 0.3},
    "knowledge": {"ask": 1.0},
    "conversation_behaviour": {"ask": 1.0, "tell": 1.0, "courtesy": 0.7, "accept": 0.7, "refuse": 0.5, "offer": 0.5},
}
_PROMISE = {"offer": 0.7, "accept": 0.7, "refuse": 0.5, "reject": 0.5, "ask": 0.3, "tell": 0.3}


def promise(acts: Sequence[Act], dimension: str) -> float:
    """How much the words alone seem to serve a dimension, 0..1."""
    if dimension in _HARM:
        return 0.0 if any(_HARM[dimension](act) for act in acts) else 1.0
    if any(act.kind == "insult" for act in acts):
        return 0.0
    uses = _USE.get(dimension, _PROMISE)
    return max((uses.get(act.kind, 0.0) for act in acts), default=0.0)


def _utterances(prompt: str, turns: Sequence[int]) -> dict[int, str]:
    """What was said at each turn, where a prompt lists utterances with their answers instead of a transcript.

    Raises:
        Unreadable: A heading is missing, or imitated by an utterance.
    """
    found = {}
    for turn in turns:
        head, tail = f"\nTurn #{turn}\n", f"\n\nAnswer to turn {turn}:\n"
        if prompt.count(head) != 1 or prompt.count(tail) != 1:
            raise Unreadable(f"turn {turn} does not stand exactly once in the list of utterances")
        body = prompt[prompt.index(head) + len(head) : prompt.index(tail)]
        _, spoken, rest = body.partition(' said: "')
        found[turn] = rest.removesuffix('"') if spoken else ""
    return found
