"""The verifiable judge: SOTOPIA's seven dimensions as pure functions of the facts and the transcript.

Whole points, each with a one-sentence reason. The rules are listed in `docs/sandbox.md`; what a person
*did* decides, never how it sounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sotopia_rl.episode import Action, Match, Score, Seat, Turn, other
from sotopia_rl.sandbox.play import Play, hear, points, replay, said
from sotopia_rl.sandbox.scenarios import sides

KNOWLEDGE_POINTS = {"hobby": 3, "want": 4, "limit": 5, "own_secret": 3, "hint": 3, "kept": 5}
LEAK_POINTS = {"limit": 4, "own_secret": 6, "kept": 8, "hint": 3}


def goal(play: Play, seat: Seat) -> float:
    """0..10: the worth of the deal; in secret talks, what was kept or found out, less 3 per insult."""
    side = play.sides[seat]
    if side.family != "secret":
        return _clip(points(play.sides, seat, play.deal.outcome), 0, 10) if play.deal else 0.0
    keeper: Seat = seat if side.role == "keeper" else other(seat)
    found = 10.0 if play.told(keeper, "kept") else 5.0 if play.told(keeper, "hint") else 0.0
    reached = 10.0 - found if seat == keeper else found
    return max(0.0, reached - 3 * play.count(seat, "insult"))


def relationship(play: Play, seat: Seat) -> float:
    """-5..5: courtesies, interest in the partner and a fair deal against insults and threats."""
    partner = other(seat)
    warm = min(2, play.count(seat, "courtesy")) + bool(play.told(partner, "hobby"))
    cold = 3 * play.count(seat, "insult") + play.count(seat, "threat") + play.count(partner, "insult")
    return _clip(warm - cold + _fairness(play, seat), -5, 5)


def _fairness(play: Play, seat: Seat) -> int:
    if play.deal is None:
        return 0
    left = points(play.sides, other(seat), play.deal.outcome)
    return 2 if left >= 4 else 0 if left >= 2 else -1


def knowledge(play: Play, seat: Seat) -> float:
    """0..10: true things the partner told."""
    topics = {fact.topic for fact in play.facts if fact.seat == other(seat) and fact.true}
    return _clip(sum(KNOWLEDGE_POINTS[topic] for topic in topics), 0, 10)


def secret(play: Play, seat: Seat) -> float:
    """-10..0: own limits and secrets that this person gave away."""
    topics = {fact.topic for fact in play.facts if fact.seat == seat and fact.true}
    return _clip(-sum(LEAK_POINTS.get(topic, 0) for topic in topics), -10, 0)


def social_rules(play: Play, seat: Seat) -> float:
    """-10..0: 3 for an insult, 2 for a threat, 3 for a lie about oneself."""
    lies = sum(not fact.true for fact in play.facts if fact.seat == seat)
    return _clip(-3 * play.count(seat, "insult") - 2 * play.count(seat, "threat") - 3 * lies, -10, 0)


def financial(play: Play, seat: Seat) -> float:
    """-5..5: half the worth of what was bought, sold or shared; below zero beyond one's own limit."""
    if play.deal is None or play.sides[seat].family not in ("price", "items"):
        return 0.0
    return _clip(points(play.sides, seat, play.deal.outcome) / 2, -5, 5)


def believability(play: Play, seat: Seat) -> float:
    """0..10: share of the utterances that make sense, are new, and do not go against the person's own limit."""
    fine = [not flaw for turn, flaw in flaws(play, seat).items()]
    return 10.0 * sum(fine) / len(fine) if fine else 5.0


def flaws(play: Play, seat: Seat) -> dict[int, str]:
    """By turn of `seat`: why an utterance is not believable, or nothing."""
    seen: set[str] = set()
    found: dict[int, str] = {}
    for now in play.heard:
        if now.seat != seat or now.action_type == "none":
            continue
        words = " ".join(now.text.lower().split())
        found[now.index] = (
            "made no sense" if now.index in play.odd else "was said before" if words and words in seen else ""
        )
        seen.add(words)
    deal = play.deal
    if deal and points(play.sides, seat, deal.outcome) < 0:
        turn = deal.turn if deal.seat == seat else deal.offer.turn
        found[turn] = "went beyond the own limit"
    return found


def verdict(match: Match, turns: Sequence[Turn]) -> tuple[dict[str, Score], dict[str, Score]]:
    """All seven dimensions for both seats, in whole points, each with its reason.

    Raises:
        ValueError: The match is not from the offline world.
    """
    return judge(replay(sides(match), hear(turns)))


def gives_away(match: Match, turns: Sequence[Turn], seat: Seat, action: Action) -> bool:
    """Whether an action of `seat`, taken after `turns`, tells a limit or a secret of their own.

    Raises:
        ValueError: The match is not from the offline world.
    """
    now = len(turns)
    play = replay(sides(match), (*hear(turns), said(now, seat, action)))
    return any(f.turn == now and f.seat == seat and f.true and f.topic in LEAK_POINTS for f in play.facts)


def judge(play: Play) -> tuple[dict[str, Score], dict[str, Score]]:
    """The verdict on a replayed conversation."""
    return _seat_scores(play, 0), _seat_scores(play, 1)


def _seat_scores(play: Play, seat: Seat) -> dict[str, Score]:
    return {
        name: Score(score=whole(rule.score(play, seat)), reason=rule.reason(play, seat))
        for name, rule in DIMENSIONS.items()
    }


def whole(value: float) -> int:
    """Nearest whole number, halves up, so that rounding never depends on parity."""
    return math.floor(value + 0.5)


def _clip(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))


def _goal_reason(play: Play, seat: Seat) -> str:
    if play.sides[seat].family != "secret":
        if play.deal is None:
            return "No deal was closed."
        return f"The deal closed at turn {play.deal.turn} on {_outcome(play)}."
    keeper: Seat = seat if play.sides[seat].role == "keeper" else other(seat)
    if play.told(keeper, "kept"):
        return "The secret was told."
    return "The secret was half given away by a hint." if play.told(keeper, "hint") else "The secret was kept."


def _outcome(play: Play) -> str:
    outcome = play.deal.outcome if play.deal else ""
    if not isinstance(outcome, frozenset):
        return str(outcome)
    rest = frozenset(play.sides[0].values) - outcome
    return f"{', '.join(sorted(outcome)) or 'nothing'} against {', '.join(sorted(rest)) or 'nothing'}"


def _counts(*kinds: str) -> Callable[[Play, Seat], str]:
    def reason(play: Play, seat: Seat) -> str:
        return "Counted " + ", ".join(f"{play.count(seat, kind)} {kind}" for kind in kinds) + "."

    return reason


def _topics(whose: str) -> Callable[[Play, Seat], str]:
    def reason(play: Play, seat: Seat) -> str:
        teller = seat if whose == "own" else other(seat)
        topics = sorted({f.topic for f in play.facts if f.seat == teller and f.true})
        return f"The {'person' if whose == 'own' else 'partner'} told: {', '.join(topics) or 'nothing'}."

    return reason


def _flaw_reason(play: Play, seat: Seat) -> str:
    found = [f"turn {turn} {flaw}" for turn, flaw in flaws(play, seat).items() if flaw]
    return (", ".join(found).capitalize() if found else "Every utterance made sense") + "."


@dataclass(frozen=True)
class Rule:
    """How a dimension is scored, in points before rounding, and what is given as the reason."""

    score: Callable[[Play, Seat], float]
    reason: Callable[[Play, Seat], str]


DIMENSIONS: dict[str, Rule] = {
    "believability": Rule(believability, _flaw_reason),
    "relationship": Rule(relationship, _counts("courtesy", "insult", "threat")),
    "knowledge": Rule(knowledge, _topics("partner")),
    "secret": Rule(secret, _topics("own")),
    "social_rules": Rule(social_rules, _counts("insult", "threat")),
    "financial_and_material_benefits": Rule(financial, _goal_reason),
    "goal": Rule(goal, _goal_reason),
}
"""SOTOPIA's seven, in its order."""
