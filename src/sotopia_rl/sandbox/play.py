"""Replay of a conversation: what was offered, agreed, learned, leaked and broken, turn by turn.

Rules. One offer stands at a time, the newest. A deal closes when a person accepts the partner's standing
offer, or offers the very same thing; it is final. Rejecting withdraws the partner's standing offer. An
act that does not fit the scenario (a price in a talk about days, an acceptance of nothing) is `odd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sotopia_rl.episode import Action, Seat, Turn
from sotopia_rl.sandbox.language import Act, understand
from sotopia_rl.sandbox.scenarios import Side

Outcome = int | str | frozenset[str]
"""A price, a day, or the items that seat 0 gets."""
_SMILES = ("smile", "nod", "wave", "bow")
ANSWERS = {
    "limit": ("limit",),
    "want": ("want",),
    "hobby": ("hobby",),
    "secret": ("kept", "hint"),
    "hint": ("hint", "kept"),
}
"""Which `tell` topics answer which `ask` topic."""


@dataclass(frozen=True)
class Said:
    """One turn as understood. `text` is empty for silent and leaving turns."""

    index: int
    seat: Seat
    action_type: str
    text: str
    acts: tuple[Act, ...]


@dataclass(frozen=True)
class Offer:
    """An offer on the table."""

    turn: int
    seat: Seat
    outcome: Outcome


@dataclass(frozen=True)
class Deal:
    """A closed deal: who closed it when, and whose offer it was."""

    turn: int
    seat: Seat
    outcome: Outcome
    offer: Offer


@dataclass(frozen=True)
class Fact:
    """Something that `seat` told: a topic, at a turn, true or not."""

    turn: int
    seat: Seat
    topic: str
    true: bool


@dataclass
class Play:
    """What happened, in the order in which it did."""

    sides: tuple[Side, Side]
    heard: tuple[Said, ...]
    deal: Deal | None = None
    standing: Offer | None = None
    """The offer on the table at the end."""
    stood: dict[int, Offer | None] = field(default_factory=dict)
    """By turn: the partner's offer that stood when the turn began."""
    moves: set[int] = field(default_factory=set)
    """Turns that moved the bargaining: offers, rejections of a standing offer, and the acceptance."""
    facts: list[Fact] = field(default_factory=list)
    odd: set[int] = field(default_factory=set)
    """Turns with an act that fits neither grammar nor scenario."""

    def told(self, seat: Seat, topic: str, *, true: bool = True) -> Fact | None:
        """The first time `seat` told this topic."""
        return next((f for f in self.facts if (f.seat, f.topic, f.true) == (seat, topic, true)), None)

    def count(self, seat: Seat, kind: str) -> int:
        """How many acts of a kind `seat` made."""
        return sum(act.kind == kind for said in self.heard if said.seat == seat for act in said.acts)


def hear(turns: Sequence[Turn]) -> tuple[Said, ...]:
    """Turns as understood, one for one."""
    return tuple(said(turn.index, turn.seat, turn.action) for turn in turns)


def said(index: int, seat: Seat, action: Action) -> Said:
    """One turn as understood. A smile, a nod, a wave or a bow is a courtesy; other gestures mean nothing."""
    text, acts = "", tuple[Act, ...]()
    if action.action_type == "speak":
        text, acts = action.argument, understand(action.argument)
    elif action.action_type in ("non-verbal communication", "action"):
        text = action.argument
        acts = (Act("courtesy" if any(word in text.lower() for word in _SMILES) else "small_talk"),)
    elif action.action_type == "leave":
        acts = (Act("goodbye"),)
    return Said(index, seat, action.action_type, text, acts)


def replay(sides: tuple[Side, Side], heard: Sequence[Said]) -> Play:
    """Follow a conversation through; never fails, whatever was said."""
    play = Play(sides, tuple(heard))
    standing: Offer | None = None
    for now in heard:
        play.stood[now.index] = standing if standing and standing.seat != now.seat else None
        for act in now.acts:
            standing = _apply(play, now, act, standing)
    play.standing = standing
    return play


def _apply(play: Play, now: Said, act: Act, standing: Offer | None) -> Offer | None:
    if act.kind in ("offer", "accept", "reject"):
        return _bargain(play, now, act, standing)
    if act.kind == "tell":
        true = is_true(play.sides[now.seat], act)
        if true is None:
            play.odd.add(now.index)
        else:
            play.facts.append(Fact(now.index, now.seat, act.topic, true))
    elif act.kind == "unknown" or (act.kind == "ask" and not _asks_sense(play.sides[now.seat], act.topic)):
        play.odd.add(now.index)
    return standing


def _bargain(play: Play, now: Said, act: Act, standing: Offer | None) -> Offer | None:
    if play.deal is not None:
        return standing
    theirs = standing if standing and standing.seat != now.seat else None
    outcome = outcome_of(play.sides[now.seat], now.seat, act)
    if act.kind == "reject":
        if theirs:
            play.moves.add(now.index)
        return None if theirs else standing
    if theirs and (outcome == theirs.outcome or (act.kind == "accept" and act.value is None)):
        play.moves.add(now.index)
        play.deal = Deal(now.index, now.seat, theirs.outcome, theirs)
        return None
    if outcome is None:
        play.odd.add(now.index)
        return standing
    play.moves.add(now.index)
    return Offer(now.index, now.seat, outcome)


def outcome_of(side: Side, seat: Seat, act: Act) -> Outcome | None:
    """The outcome that an offer or a named acceptance by `seat` proposes; None where it fits nothing here."""
    if side.family == "price" and isinstance(act.value, int):
        return act.value
    if side.family == "time" and act.value in side.values:
        return str(act.value)
    if side.family != "items" or not isinstance(act.value, tuple):
        return None
    every = frozenset(side.values)
    mine, yours = act.value
    mine, yours = (mine or every - yours), (yours or every - mine)
    if mine | yours != every or mine & yours:
        return None
    return mine if seat == 0 else yours


def is_true(side: Side, act: Act) -> bool | None:
    """Whether what a person tells of themselves is so; None where it makes no sense in this scenario."""
    best = max(side.values, key=lambda name: side.values[name], default="")
    truth: dict[str, object] = {
        "limit": side.limit or None,
        "want": best or None,
        "hobby": side.hobby or None,
        "own_secret": side.own_secret or None,
        "kept": side.kept or None,
        "hint": side.kept[:1].lower() or None,
    }
    return None if truth[act.topic] is None else truth[act.topic] == act.value


def _asks_sense(side: Side, topic: str) -> bool:
    sense = {"limit": side.family == "price", "want": bool(side.values), "hobby": True}
    return sense.get(topic, side.role == "asker")


def points(sides: tuple[Side, Side], seat: Seat, outcome: Outcome) -> float:
    """What an outcome is worth to a seat, in points, 0 to 10 where nobody goes beyond a limit.

    A price counts its distance from the person's own limit in tenths of the distance between the limits.
    """
    side = sides[seat]
    if isinstance(outcome, int):
        zone = abs(sides[0].limit - sides[1].limit)
        margin = outcome - side.limit if side.role == "seller" else side.limit - outcome
        return 10 * margin / zone
    if isinstance(outcome, str):
        return float(side.values[outcome])
    mine = outcome if seat == 0 else frozenset(side.values) - outcome
    return float(sum(side.values[item] for item in mine))


def without(play: Play, turn: int) -> tuple[Said, ...]:
    """The conversation with one turn silent; what the partner told next in answer to it falls away too."""
    gone = play.heard[turn]
    answers = {topic for act in gone.acts if act.kind == "ask" for topic in ANSWERS.get(act.topic, ())}
    heard = list(play.heard)
    heard[turn] = replace(gone, action_type="none", text="", acts=())
    if turn + 1 < len(heard):
        after = heard[turn + 1]
        kept = tuple(a for a in after.acts if not (a.kind == "tell" and a.topic in answers))
        heard[turn + 1] = replace(after, acts=kept)
    return tuple(heard)


def partner_asked(play: Play, turn: int) -> bool:
    """Whether the turn before asked for the kept secret."""
    if turn == 0:
        return False
    return any(act.kind == "ask" and act.topic in ("secret", "hint") for act in play.heard[turn - 1].acts)
