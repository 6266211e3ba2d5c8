"""From a prompt back to facts and turns, for the scripted models only: they are given text, as any model is.

The rest of the package never parses text back. Here it cannot be avoided, so it is done strictly: the texts
that `observe.py` writes are read by their exact form, and where a prompt has no reading or more than one (an
utterance may imitate a turn's heading) it is refused with `Unreadable`, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import cast

from sotopia_rl.episode import Action, ActionType, Seat
from sotopia_rl.sandbox.play import Said, said
from sotopia_rl.sandbox.scenarios import Side, read_side

_OPENING = "Here is the context of this interaction:\n"
_STARTS = "\nConversation Starts:\n"
_CONTEXT = re.compile(
    re.escape(_OPENING) + r"Scenario: (?P<scenario>.*)\nParticipants: (?P<both>.*)\n"
    r"(?P<name0>.*)'s background: (?P<background0>.*)\n(?P<name1>.*)'s background: (?P<background1>.*)\n"
    r"(?P<goal_name0>.*)'s goal: (?P<goal0>.*)\n(?P<goal_name1>.*)'s goal: (?P<goal1>.*)"
)
_AGENT_TAIL = re.compile(r"(?:\.\n)?You are at Turn #(\d+)\.(?: Your available action types are\n|\Z)")
_ASKED = r"\nBased on previous interactions, evaluate how well participants achieve their goals\.\n"
_JUDGE_TAIL = re.compile(
    rf"\n{_ASKED}The conversation above has|,{_ASKED}Please following the format:|{_ASKED}There are exactly 2 agents"
    r"|\n\n---\n"
)
_SPOKEN = re.compile(r'said: "(.*)"', re.DOTALL)
_DONE = re.compile(r"\[(non-verbal communication|action)\] (.*)", re.DOTALL)


class Unreadable(ValueError):  # noqa: N818  (it says what the prompt is)
    """A prompt that has no reading, or more than one."""


@dataclass(frozen=True)
class Context:
    """The opening block. A goal the reader may not know is `Unknown`."""

    names: tuple[str, str]
    scenario: str
    backgrounds: tuple[str, str]
    goals: tuple[str, str]
    end: int
    """Where in the prompt the block ends."""

    def side(self, seat: Seat) -> Side:
        """What the block says of one person.

        Raises:
            Unreadable: The goal is not one of the offline world's.
        """
        try:
            return read_side(self.goals[seat], self.backgrounds[seat])
        except ValueError as error:
            raise Unreadable(str(error)) from error


@dataclass(frozen=True)
class Seen:
    """What an agent can know at its turn."""

    seat: Seat
    context: Context
    side: Side
    heard: tuple[Said, ...]

    @property
    def turn(self) -> int:
        """The turn it is to act at."""
        return len(self.heard)


@dataclass(frozen=True)
class Observed:
    """What a judge or an annotator sees."""

    context: Context
    sides: tuple[Side, Side]
    actions: tuple[Action, ...]
    heard: tuple[Said, ...]
    rest: str
    """The prompt after the transcript."""


def read_context(prompt: str) -> Context:
    """The opening block of a prompt.

    Raises:
        Unreadable: There is none in the exact form.
    """
    found = _CONTEXT.search(prompt)
    if found is None:
        raise Unreadable("the prompt holds no context block of the known form")
    names = (found["name0"], found["name1"])
    if found["both"] != f"{names[0]} and {names[1]}" or names != (found["goal_name0"], found["goal_name1"]):
        raise Unreadable("the participants, backgrounds and goals of the context do not belong to the same two people")
    return Context(
        names=names,
        scenario=found["scenario"],
        backgrounds=(found["background0"], found["background1"]),
        goals=(found["goal0"], found["goal1"]),
        end=found.end(),
    )


def read_agent(prompt: str) -> Seen:
    """What an agent's prompt tells it, whatever the profile.

    Raises:
        Unreadable: The prompt has no reading, or more than one.
    """
    context = read_context(prompt)
    known = [seat for seat in (0, 1) if context.goals[seat] != "Unknown"]
    if len(known) != 1:
        raise Unreadable("an agent's prompt shows exactly one goal")
    seat: Seat = 0 if known[0] == 0 else 1
    if not prompt.startswith(_STARTS, context.end):
        raise Unreadable("the conversation does not start after the context")
    actions, _ = _only(prompt, _agent_readings(prompt, context.end + len(_STARTS), context.names, 0))
    return Seen(seat, context, context.side(seat), _hear(actions))


def read_observed(prompt: str) -> Observed:
    """What a judge's or an annotator's prompt shows; the first turn may be numbered 0 or 1.

    Raises:
        Unreadable: The prompt has no reading, or more than one.
    """
    context = read_context(prompt)
    first = 0 if prompt.startswith("\nTurn #0", context.end) else 1
    actions, end = _only(prompt, _judge_readings(prompt, context.end, context.names, 0, first))
    return Observed(context, (context.side(0), context.side(1)), actions, _hear(actions), prompt[end:])


_Reading = tuple[tuple[Action, ...], int]
"""The actions, and where the transcript ends."""


_MOST_READINGS = 100
_COUNT = re.compile(r"^(?:Turns shown: (\d+)$|The conversation above has (\d+) turns\.)", re.MULTILINE)


def _only(prompt: str, readings: Iterator[_Reading]) -> _Reading:
    """The one reading with as many turns as the prompt says; where it does not say, the one with the most turns.

    A last utterance that imitates further turns looks exactly like those turns, so only the count can tell
    them apart; SOTOPIA's own judge prompts have none.
    """
    found = list(islice(readings, _MOST_READINGS))
    fitting = [r for r in found if _stated_turns(prompt[r[1] :]) in (None, len(r[0]))]
    longest = [r for r in fitting if len(r[0]) == max(len(other[0]) for other in fitting)]
    if len(longest) != 1 or len(found) == _MOST_READINGS:
        raise Unreadable("the transcript has two readings" if longest else "the transcript has no reading")
    return longest[0]


def _stated_turns(rest: str) -> int | None:
    counts = [int(found[1] or found[2]) for found in _COUNT.finditer(rest)]
    return counts[-1] if counts else None


def _agent_readings(prompt: str, start: int, names: tuple[str, str], turn: int) -> Iterator[_Reading]:
    tail = _AGENT_TAIL.match(prompt, start)
    if tail and int(tail[1]) == turn:
        yield (), start
    heading = f"\nTurn #{turn}: "
    if not prompt.startswith(heading, start):
        return
    start += len(heading)
    for end in _ends(prompt, start, "\n"):
        if not (prompt.startswith(f"\nTurn #{turn + 1}: ", end + 1) or _AGENT_TAIL.match(prompt, end + 1)):
            continue
        action = _action(prompt[start:end], names[turn % 2])
        if action is not None:
            for rest, last in _agent_readings(prompt, end + 1, names, turn + 1):
                yield (action, *rest), last


def _judge_readings(prompt: str, start: int, names: tuple[str, str], turn: int, first: int) -> Iterator[_Reading]:
    if _JUDGE_TAIL.match(prompt, start):
        yield (), start
    heading = f"\nTurn #{turn + first}"
    if not prompt.startswith(heading, start):
        return
    start += len(heading)
    for end in (*_ends(prompt, start, "\n"), *_ends(prompt, start, ",\n"), len(prompt)):
        if not (prompt.startswith(f"\nTurn #{turn + 1 + first}", end) or _JUDGE_TAIL.match(prompt, end)):
            continue
        action = _shown(prompt[start:end], names[turn % 2])
        if action is not None:
            for rest, last in _judge_readings(prompt, end, names, turn + 1, first):
                yield (action, *rest), last


def _ends(prompt: str, start: int, mark: str) -> Iterator[int]:
    """Places at which a turn's text may end."""
    at = prompt.find(mark, start)
    while at >= 0:
        yield at
        at = prompt.find(mark, at + 1)


def _shown(body: str, name: str) -> Action | None:
    """As `_action`, for a judge's transcript, where a turn's text has its own line and a silent turn none."""
    if body == "":
        return Action(action_type="none")
    return _action(body[1:], name) if body.startswith(f"\n{name} ") else None


def _action(body: str, name: str) -> Action | None:
    """The action that a turn's text tells of; None where it tells of none by `name`."""
    if body == "":
        return Action(action_type="none")
    if not body.startswith(f"{name} "):
        return None
    done = body[len(name) + 1 :]
    if done == "left the conversation":
        return Action(action_type="leave")
    if spoken := _SPOKEN.fullmatch(done):
        return Action(action_type="speak", argument=spoken[1])
    if other_act := _DONE.fullmatch(done):
        return Action(action_type=cast(ActionType, other_act[1]), argument=other_act[2])
    return None


def _hear(actions: tuple[Action, ...]) -> tuple[Said, ...]:
    return tuple(said(index, 0 if index % 2 == 0 else 1, action) for index, action in enumerate(actions))
