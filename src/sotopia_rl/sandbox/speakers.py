"""The scripted people: temperaments, and how each of them acts on what its prompt lets it know.

A temperament is a row of numbers and a set of wordings. All of them run the same small policy: close what
is closed, answer what was asked, accept what is good enough, otherwise make the next offer. How good is good
enough falls from `opens` to `bottom` points, by `step` per own move.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from sotopia_rl.episode import Action, Seat
from sotopia_rl.sandbox.language import KEPT, Act
from sotopia_rl.sandbox.play import Offer, Outcome, Play, Said, replay
from sotopia_rl.sandbox.reading import Seen
from sotopia_rl.sandbox.scenarios import Role, Side

PRICE_PER_POINT = 3
"""A price's distance from the own limit that a speaker takes for one point; the true zone is not known to it."""


@dataclass(frozen=True)
class Temperament:
    """How somebody bargains, answers and asks. Levels are in points of the goal, chances in 0..1."""

    opens: float
    step: float
    bottom: float
    eager: float = 0.5
    """How far below its next wish it still accepts."""
    patience: int = 5
    """Own moves before it gives up."""
    presses: int = 3
    """Times it asks for a secret before it gives up."""
    courtesy: float = 0.0
    asks: float = 0.0
    small_talk: float = 0.0
    insults: float = 0.0
    threatens: float = 0.0
    lies: float = 0.0
    leaks: bool = False
    hints_after: int = 99
    """Times it must be asked before it gives a hint of a kept secret."""
    tells_after: int = 99
    exploits: bool = False
    """Uses a limit that the partner let slip."""
    thin_skinned: bool = True
    """Leaves when insulted twice."""
    offers: tuple[str, ...] = ("How about {}",)
    accepts: tuple[str, ...] = ("Deal",)
    refuses: tuple[str, ...] = ("Sorry, I can not tell you",)


TEMPERAMENTS: dict[str, Temperament] = {
    "fair": Temperament(
        opens=8, step=1.25, bottom=3.5, presses=4, courtesy=0.5, asks=0.35, exploits=True,
        offers=("How about {}?", "What about {}?"), accepts=("Deal. Thank you.", "Agreed. Thank you."),
    ),
    "tough": Temperament(
        opens=9.5, step=0.8, bottom=5, patience=6, presses=4, threatens=0.2, lies=0.4, exploits=True,
        thin_skinned=False,
        offers=("I need {}.", "{} is my last offer."), accepts=("Agreed.", "Deal."), refuses=("I will not tell you",),
    ),
    "generous": Temperament(
        opens=4, step=1.5, bottom=1, eager=1, presses=2, courtesy=0.5, hints_after=1, tells_after=2,
        offers=("I can do {}.", "I can go to {}."), accepts=("Yes, deal.", "Yes, I accept."),
    ),
    "hasty": Temperament(
        opens=4.5, step=2, bottom=0.5, eager=10, patience=4, presses=1, tells_after=1,
        offers=("Make it {}.", "Let us say {}."), accepts=("Ok, deal.", "Ok, I agree."),
    ),
    "talkative": Temperament(
        opens=6.5, step=1.5, bottom=2.5, patience=6, courtesy=0.3, asks=0.6, small_talk=0.5,
        hints_after=2, tells_after=3,
        offers=("Let us say {}.", "How about {}?"), accepts=("It is a deal.", "Deal. Thank you."),
    ),
    "leaky": Temperament(
        opens=5, step=1.5, bottom=1, eager=1, presses=2, leaks=True, tells_after=1,
        offers=("I offer {}.", "I can do {}."), accepts=("Yes, deal.", "Ok, deal."),
    ),
    "rude": Temperament(
        opens=9, step=1.5, bottom=4, insults=0.5, threatens=0.2, lies=0.2, thin_skinned=False,
        offers=("I want {}.", "I need {}."), accepts=("Fine, deal.", "Deal."), refuses=("I will not tell you",),
    ),
}  # fmt: skip
"""By name; the model strings are `scripted/NAME`."""

_PARTNER: dict[Role, Role] = {"seller": "buyer", "buyer": "seller", "keeper": "asker", "asker": "keeper"}
_CHATTER = ("The weather is nice today.", "I slept well.", "This is a nice place.", "The bus was late.")
_INSULTS = ("You are a fool.", "You are greedy.", "That is a joke.", "Do not waste my time.", "You are a clown.")
_GREETINGS = ("Hello.", "Nice to meet you.", "Hi.")
_WARM = ("I see your point.", "That is kind of you.", "I hope we both win.")


@dataclass(frozen=True)
class Situation:
    """What one person makes of the conversation so far."""

    seen: Seen
    play: Play
    mine: tuple[Said, ...]
    theirs: tuple[Said, ...]

    @property
    def side(self) -> Side:
        return self.seen.side

    @property
    def asked(self) -> tuple[str, ...]:
        """Topics that the partner's last turn asked about."""
        last = self.theirs[-1].acts if self.theirs else ()
        return tuple(act.topic for act in last if act.kind == "ask")

    def heard(self, topic: str) -> Act | None:
        """What the partner last told on a topic."""
        told = [a for s in self.theirs for a in s.acts if a.kind == "tell" and a.topic == topic]
        return told[-1] if told else None

    def suffered(self, *kinds: str) -> int:
        """Times the partner was rude in one of these ways."""
        return sum(act.kind in kinds for s in self.theirs for act in s.acts)

    def did(self, kind: str, *topics: str) -> int:
        """Own turns with such an act."""
        return sum(any(a.kind == kind and (not topics or a.topic in topics) for a in s.acts) for s in self.mine)


def situation(seen: Seen) -> Situation:
    """Read the conversation from one person's chair; the partner's side is filled in with what is common."""
    partner = Side(seen.side.family, _PARTNER.get(seen.side.role, seen.side.role), values=dict(seen.side.values))
    both = (seen.side, partner) if seen.seat == 0 else (partner, seen.side)
    mine = tuple(s for s in seen.heard if s.seat == seen.seat)
    theirs = tuple(s for s in seen.heard if s.seat != seen.seat)
    return Situation(seen, replay(both, seen.heard), mine, theirs)


def act(temper: Temperament, seen: Seen, rng: random.Random) -> Action:
    """What somebody of this temperament does next."""
    now = situation(seen)
    if _is_over(temper, now):
        return _part(temper, now, rng)
    before = _before(temper, now, rng)
    if now.side.role == "keeper":
        sentences = _keep(temper, now, rng)
    elif now.side.role == "asker":
        sentences = _find_out(temper, now, rng)
    else:
        sentences = _bargain(temper, now, rng)
    if not sentences:
        return _part(temper, now, rng)
    return Action(action_type="speak", argument=" ".join([*before, *sentences]))


def _is_over(temper: Temperament, now: Situation) -> bool:
    last = now.theirs[-1].acts if now.theirs else ()
    hurt = temper.thin_skinned and now.suffered("insult") >= 2
    return now.play.deal is not None or hurt or any(a.kind == "goodbye" for a in last) or now.did("goodbye") > 0


def _part(temper: Temperament, now: Situation, rng: random.Random) -> Action:
    if rng.random() < temper.courtesy and not now.did("goodbye") and not now.suffered("insult"):
        return Action(action_type="speak", argument="It was nice to talk. Goodbye.")
    return Action(action_type="leave")


def _before(temper: Temperament, now: Situation, rng: random.Random) -> list[str]:
    """Sentences that come before the business: courtesy, insult, answers to personal questions."""
    said: list[str] = []
    last = now.theirs[-1].acts if now.theirs else ()
    if any(a.kind == "insult" for a in last) and temper.courtesy:
        said.append("Please be kind.")
    elif rng.random() < temper.courtesy and now.did("courtesy") < 2:
        said.append(rng.choice(_WARM if now.mine else _GREETINGS))
    if rng.random() < temper.insults and (now.mine or now.theirs):
        said.append(_INSULTS[(len(now.mine) + rng.randrange(2)) % len(_INSULTS)])
    if "hobby" in now.asked and not temper.insults:
        said.append(f"I like {now.side.hobby}.")
    if temper.leaks and now.side.own_secret and len(now.mine) == 1:
        said.append(f"Between us, I {now.side.own_secret}.")
    return said


def _keep(temper: Temperament, now: Situation, rng: random.Random) -> list[str]:
    """What a keeper says; nothing when it has had enough."""
    if not set(now.asked) & {"secret", "hint"}:
        if temper.leaks and now.mine:
            return [f"It is {now.side.kept}."]
        return [] if len(now.mine) >= temper.patience else _chat(now, rng)
    given = _yield(temper, now)
    if given or len(now.mine) >= temper.patience:
        return given
    if rng.random() < temper.lies and not now.did("tell", "kept"):
        return [f"It is {rng.choice([v for v in KEPT[now.side.topic] if v != now.side.kept])}."]
    refusals = (*temper.refuses, "I would rather not say", "That is private", "I can not say that")
    return [refusals[now.did("refuse") % len(refusals)] + "."]


def _yield(temper: Temperament, now: Situation) -> list[str]:
    """The secret or a hint, once asked often enough; never to somebody who insults or threatens, unless leaky."""
    if now.suffered("insult", "threat") and not temper.leaks:
        return []
    times = sum(any(a.kind == "ask" and a.topic in ("secret", "hint") for a in s.acts) for s in now.theirs)
    if times >= temper.tells_after:
        return [f"It is {now.side.kept}."]
    hinted = now.did("tell", "hint")
    return [f"It starts with {now.side.kept[0]}."] if times >= temper.hints_after and not hinted else []


def _find_out(temper: Temperament, now: Situation, rng: random.Random) -> list[str]:
    if now.heard("kept"):
        return []
    times = now.did("ask", "secret", "hint")
    if times >= temper.presses:
        return []
    if rng.random() < temper.small_talk and len(now.mine) < 4:
        return _chat(now, rng)
    topic = now.side.topic
    if temper.threatens and times >= 2 and rng.random() < 2 * temper.threatens:
        return [f"Tell me the {topic}.", "Tell me now or I go."]
    if times % 2 and not now.heard("hint"):
        return ["Can you give me a hint?" if temper.courtesy else "Give me a hint."]
    ways = (
        ("Can you tell me the {}?", "Will you tell me the {}?")
        if temper.courtesy
        else ("Tell me the {}.", "I need to know the {}.")
    )
    return [ways[(times // 2) % 2].format(topic) if times < 4 else f"What is the {topic}?"]


def _chat(now: Situation, rng: random.Random) -> list[str]:
    if not now.did("ask", "hobby") and rng.random() < 0.5:
        return ["What do you like to do?"]
    unsaid = [line for line in _CHATTER if all(line not in s.text for s in now.mine)]
    return [rng.choice(unsaid or _CHATTER)]


def _bargain(temper: Temperament, now: Situation, rng: random.Random) -> list[str]:
    answers = _answers(temper, now)
    table = _standing(now)
    made = sum(s.index in now.play.moves for s in now.mine)
    wish = _wish(temper, now, made)
    if table and worth(now.side, now.seen.seat, table.outcome) >= max(temper.bottom, wish - temper.eager):
        return [*answers, rng.choice(temper.accepts)]
    if made >= temper.patience:
        return ["No deal.", "Goodbye."] if temper.courtesy else []
    if made == 0 and not now.did("ask") and rng.random() < temper.asks:
        return [*answers, _question(now.side, rng, temper)]
    if rng.random() < temper.small_talk and now.did("small_talk") < 2:
        return [*answers, *_chat(now, rng)]
    return [*answers, *_offer(temper, now, wish, rng, firm=bool(table) and made > 1)]


def _standing(now: Situation) -> Offer | None:
    """The partner's offer on the table now: made in its last turn, or earlier and not answered since."""
    return next((offer for offer in [now.play.standing] if offer and offer.seat != now.seen.seat), None)


def _wish(temper: Temperament, now: Situation, made: int) -> float:
    wish = max(temper.bottom, temper.opens - temper.step * made)
    told = now.heard("limit")
    if temper.exploits and told and isinstance(told.value, int):
        return max(wish, min(9.0, worth(now.side, now.seen.seat, told.value) - 5 / PRICE_PER_POINT))
    return wish


def _answers(temper: Temperament, now: Situation) -> list[str]:
    side = now.side
    said: list[str] = []
    if "limit" in now.asked and not temper.leaks:
        said.append(f"{temper.refuses[0]}.")
    if "want" in now.asked and side.values and not now.did("tell", "want"):
        best = max(side.values, key=lambda name: side.values[name])
        said.append(f"I want the {best} most." if side.family == "items" else f"{best} suits me best.")
    if temper.leaks and side.limit and not now.did("tell", "limit"):
        said.append(f"My limit is {side.limit}.")
    return said


def _question(side: Side, rng: random.Random, temper: Temperament) -> str:
    if rng.random() < temper.small_talk:
        return "What do you like to do?"
    if side.family == "price":
        return "What is your best price?"
    return "What do you want most?" if side.family == "items" else "Which day suits you best?"


def _offer(temper: Temperament, now: Situation, wish: float, rng: random.Random, *, firm: bool) -> list[str]:
    outcome = proposal(now, wish)
    threat = ["Take it or leave it."] if firm and rng.random() < temper.threatens else []
    if isinstance(outcome, frozenset):
        mine = outcome if now.seen.seat == 0 else frozenset(now.side.values) - outcome
        return [_share(temper, mine, frozenset(now.side.values) - mine, now), *threat]
    ways = [w for w in temper.offers if all(w.format(outcome) not in s.text for s in now.mine)] or [*temper.offers]
    return [rng.choice(ways).format(outcome), *threat]


def _share(temper: Temperament, mine: frozenset[str], yours: frozenset[str], now: Situation) -> str:
    if temper.courtesy and not temper.exploits:
        return f"You can have {_listed(yours)}."
    repeated = now.did("offer") % 2
    verb = ("need", "want") if not temper.courtesy else ("take", "get")
    text = f"I {verb[repeated]} {_listed(mine)}."
    return f"{text} You get {_listed(yours)}." if temper.exploits and temper.courtesy else text


def _listed(items: frozenset[str]) -> str:
    names = [f"the {item}" for item in sorted(items)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def worth(side: Side, seat: Seat, outcome: Outcome) -> float:
    """What an outcome seems worth to a person who knows only its own side, in points."""
    if isinstance(outcome, int):
        return (outcome - side.limit if side.role == "seller" else side.limit - outcome) / PRICE_PER_POINT
    if isinstance(outcome, str):
        return float(side.values[outcome])
    mine = outcome if seat == 0 else frozenset(side.values) - outcome
    return float(sum(side.values[item] for item in mine))


def proposal(now: Situation, wish: float) -> Outcome:
    """The outcome nearest above a wish; among equals the one with the partner's known favourite.

    A price never goes back behind an earlier offer of one's own.
    """
    side, seat = now.side, now.seen.seat
    if side.family == "price":
        return _price(side, now, wish)
    options: Sequence[Outcome] = list(side.values) if side.family == "time" else _divisions(side)
    favourite = now.heard("want")
    liked = favourite.value if favourite else None

    def rank(option: Outcome) -> tuple[bool, float, bool, str]:
        value = worth(side, seat, option)
        gives = option == liked if isinstance(option, str) else liked not in _own(side, seat, option)
        return (value < wish, abs(value - wish), not gives, str(sorted(option)) if not isinstance(option, int) else "")

    return min(options, key=rank)


def _own(side: Side, seat: Seat, option: Outcome) -> frozenset[str]:
    if not isinstance(option, frozenset):
        return frozenset()
    return option if seat == 0 else frozenset(side.values) - option


def _divisions(side: Side) -> list[Outcome]:
    names = sorted(side.values)
    return [frozenset(chosen) for size in (1, 2) for chosen in combinations(names, size)]


def _price(side: Side, now: Situation, wish: float) -> int:
    sign = 1 if side.role == "seller" else -1
    margin = 5 * round(max(0.0, wish) * PRICE_PER_POINT / 5)
    price = min(95, max(5, side.limit + sign * margin))
    said = [a.value for s in now.mine for a in s.acts if a.kind == "offer" and isinstance(a.value, int)]
    earlier = [sign * value for value in said]
    return sign * min([sign * price, *earlier]) if earlier else price
