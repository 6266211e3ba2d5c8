"""Exact credit: how much of a score an utterance really brought about, by replaying the conversation without it.

The credit of utterance t is the mean of `score - score had the person done otherwise`, over the things that
could have been done instead, as a share of the score, held within 0..1:

    A(t) = clip(mean over alternatives a of (S - S_a(t)) / S, 0, 1)          and 0 where S = 0

What could have been done instead depends on the dimension:

* goal and material benefits, for a move of the bargaining (offer, rejection, acceptance): *break off* (the
  talk ends before t) and *give in* (the partner's standing offer is taken; with none standing, nothing is won);
* goal, for a question after the secret: break off; for whoever keeps it and was just asked: say nothing, and
  tell;
* goal, for anything else, and the other dimensions: say nothing (what the partner told in answer falls away);
* believability: say something that makes no sense.

Why both `break off` and `give in`: with the reward A x G, holding out at an offer worth g and closing at G
earns G - g/2, and taking the offer earns g/2. Holding out is the better of the two exactly when G > g, which
is what a policy should learn. With `break off` alone the credits are all 1; with `give in` alone acceptance
earns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sotopia_rl.episode import Match, Seat, Turn
from sotopia_rl.sandbox.language import Act
from sotopia_rl.sandbox.play import Play, Said, hear, partner_asked, replay, without
from sotopia_rl.sandbox.scenarios import sides
from sotopia_rl.sandbox.verdict import DIMENSIONS

_ASKS = ("secret", "hint")


def exact_credit(match: Match, turns: Sequence[Turn], seat: Seat, dimension: str) -> dict[int, float]:
    """Credit of each utterance of `seat`, by turn index, in 0..1; silent turns have none.

    Raises:
        ValueError: The dimension is unknown, or the match is not from the offline world.
    """
    return credit(replay(sides(match), hear(turns)), seat, dimension)


def credit(play: Play, seat: Seat, dimension: str) -> dict[int, float]:
    """As `exact_credit`, of a replayed conversation."""
    if dimension not in DIMENSIONS:
        raise ValueError(f"unknown dimension {dimension!r}; the offline world has {', '.join(DIMENSIONS)}")
    return {turn: turn_credit(play, turn, dimension) for turn in utterances(play, seat)}


def turn_credit(play: Play, turn: int, dimension: str) -> float:
    """The credit of one turn; a silent one has none."""
    now, score = play.heard[turn], DIMENSIONS[dimension].score
    if now.action_type == "none":
        return 0.0
    return _share(score(play, now.seat), alternatives(play, turn, dimension, score))


def utterances(play: Play, seat: Seat) -> list[int]:
    """Turns in which `seat` did something."""
    return [said.index for said in play.heard if said.seat == seat and said.action_type != "none"]


def alternatives(play: Play, turn: int, dimension: str, score: Callable[[Play, Seat], float]) -> list[float]:
    """Scores that the speaker of a turn would have reached by doing something else there."""
    seat = play.heard[turn].seat
    if dimension == "believability":
        noise = (Act("unknown"),)
        return [score(_again(play, _with(play, turn, action_type="speak", text="", acts=noise)), seat)]
    if dimension in ("goal", "financial_and_material_benefits"):
        broken_off = score(_again(play, play.heard[:turn]), seat)
        if turn in play.moves:
            return [broken_off, _given_in(play, turn, score)]
        if _asks_for_secret(play, turn):
            return [broken_off]
        if dimension == "goal" and play.sides[seat].role == "keeper" and partner_asked(play, turn):
            return [score(_again(play, without(play, turn)), seat), score(_again(play, _telling(play, turn)), seat)]
    return [score(_again(play, without(play, turn)), seat)]


def silent_score(play: Play, turn: int, dimension: str) -> float:
    """The score had the speaker of a turn said nothing there (of a move: had the talk ended there)."""
    return alternatives(play, turn, dimension, DIMENSIONS[dimension].score)[0]


def _share(reached: float, instead: list[float]) -> float:
    if reached == 0:
        return 0.0
    lost = sum(reached - score for score in instead) / len(instead)
    return min(1.0, max(0.0, lost / reached))


def _again(play: Play, heard: Sequence[Said]) -> Play:
    return replay(play.sides, heard)


def _with(play: Play, turn: int, *, action_type: str, text: str, acts: tuple[Act, ...]) -> list[Said]:
    heard = list(play.heard)
    heard[turn] = replace(heard[turn], action_type=action_type, text=text, acts=acts)
    return heard


def _given_in(play: Play, turn: int, score: Callable[[Play, Seat], float]) -> float:
    """The score had the partner's standing offer been taken at this turn, and nothing been said after."""
    now = play.heard[turn]
    agreed = replace(now, action_type="speak", text="Deal.", acts=(Act("accept"),))
    return score(_again(play, [*play.heard[:turn], agreed]), now.seat)


def _asks_for_secret(play: Play, turn: int) -> bool:
    """Whether the turn asks for what is kept secret, and it was not told before."""
    seat = play.heard[turn].seat
    asks = any(act.kind == "ask" and act.topic in _ASKS for act in play.heard[turn].acts)
    told = any(fact.topic == "kept" and fact.true and fact.turn < turn for fact in play.facts)
    return asks and not told and play.sides[seat].role == "asker"


def _telling(play: Play, turn: int) -> list[Said]:
    kept = play.sides[play.heard[turn].seat].kept
    return _with(play, turn, action_type="speak", text=f"It is {kept}.", acts=(Act("tell", "kept", kept),))
