"""The controlled English of the offline world: from one utterance to its speech acts.

Context-free on purpose: the same sentence means the same thing in every scenario; whether it fits the
scenario is decided in `play.py`. A sentence outside the grammar is an act of kind `unknown`, never an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal[
    "offer",  # value: price, day or (what I take, what you take)
    "accept",  # value: None, or the outcome named in it
    "reject",
    "ask",  # topic: limit, want, hobby, secret, hint
    "tell",  # topic: limit, want, hobby, own_secret, kept, hint
    "refuse",  # declines to answer, politely
    "courtesy",
    "insult",
    "threat",
    "object",  # asks the partner to stay polite
    "small_talk",
    "goodbye",
    "unknown",
]
Shares = tuple[frozenset[str], frozenset[str]]
Value = int | str | Shares | None

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
TOWNS = ("Rome", "Oslo", "Lima", "Cairo", "Delhi")
COLOURS = ("red", "blue", "green", "white", "yellow")
KEPT = {"day": DAYS, "town": TOWNS, "colour": COLOURS}
"""What may be kept secret, with the values it can have."""
ITEMS = ("drum", "kite", "vase", "clock", "chair", "ring", "book", "lamp", "globe", "scarf")
HOBBIES = ("chess", "tea", "music", "hiking", "films", "poems", "tennis", "maps", "soup", "dogs")
SECRETS = ("lost a bet", "broke a window", "failed a test", "sold a gift", "missed a wedding", "forgot a debt")
"""Past-tense deeds, so that `Lost a bet.` in a background and `I lost a bet.` in speech share their words."""


@dataclass(frozen=True)
class Act:
    """One speech act. `topic` is set for `ask` and `tell`, `value` where the act names something."""

    kind: Kind
    topic: str = ""
    value: Value = None


_CANON = {word.lower(): word for group in KEPT.values() for word in group}
_DAY = "|".join(d.lower() for d in DAYS)
_KEPT = "|".join(_CANON)
_ITEM = "|".join(ITEMS)
_LIST = rf"(?:the )?(?:{_ITEM})(?:(?:,? and|,) (?:the )?(?:{_ITEM}))*"

_RULES: tuple[tuple[Kind, str, tuple[str, ...]], ...] = (
    ("offer", "price", (
        (r"(?:i (?:want|ask|offer|say|need|can pay|can give|can do|can go (?:down |up )?to)|how about|what about|"
        r"make it|let us say|my (?:price|offer) is) (?P<price>\d{1,4})(?: for it)?"),
        r"(?P<price>\d{1,4}) is (?:a fair price|my best price|my last offer)",
    )),
    ("offer", "day", (
        (r"(?:i (?:want|need|offer|can do|can go to)|how about|what about|make it|let us say|let us meet on) "
        rf"(?P<day>{_DAY})"),
        rf"(?P<day>{_DAY}) is (?:a fair choice|my last offer)",
    )),
    ("offer", "mine", (rf"(?:i (?:take|want|need|get)|let me have) (?P<items>{_LIST})",)),
    ("offer", "yours", (rf"you (?:take|get|can have) (?P<items>{_LIST})",)),
    ("offer", "rest_yours", (r"you (?:take|get|can have) the rest",)),
    ("accept", "", (
        (r"(?:yes,? |ok,? |fine,? )?(?:it is a deal|deal|agreed|i accept|i agree|you have a deal)"
        rf"(?: (?:at|to|on|with) (?:(?P<price>\d{{1,4}})|(?P<day>{_DAY})|that))?"),
    )),
    ("reject", "", (
        r"no|no deal|that is too (?:low|high|little|much)|that is not enough|that does not suit me",
        r"i can not (?:do|take|accept) that",
    )),
    ("ask", "limit", (r"what is your (?:limit|lowest price|highest price|best price)",)),
    ("ask", "want", (r"what do you want most|which day suits you best|what matters most to you",)),
    ("ask", "hobby", (r"what do you like(?: to do)?",)),
    ("ask", "secret", (
        r"(?:what is|can you tell me|will you tell me|tell me|i need to know) the (?:day|town|colour)",
    )),
    ("ask", "hint", (r"(?:can you )?give me a hint",)),
    ("tell", "limit", (
        r"(?:my (?:limit|lowest price|highest price) is|i can not go (?:below|above)) (?P<price>\d{1,4})",
    )),
    ("tell", "want", (rf"i want the (?P<item>{_ITEM}) most", rf"(?P<day>{_DAY}) suits me best")),
    ("tell", "hobby", (rf"i like (?P<hobby>{'|'.join(HOBBIES)})",)),
    ("tell", "own_secret", (rf"(?:between us,? )?i (?P<secret>{'|'.join(SECRETS)})",)),
    ("tell", "kept", (rf"(?:it is|the (?:day|town|colour) is) (?P<kept>{_KEPT})",)),
    ("tell", "hint", (r"it starts with (?P<letter>[a-z])",)),
    ("refuse", "", (
        r"i can not (?:say|tell you)(?: that)?|i would rather not say|that is private|i will not tell you",
    )),
    ("courtesy", "", (
        r"hello|hi|nice to meet you|thank you|thanks|that is kind of you|i see your point",
        r"i hope we both win|have a nice day|it was nice to talk",
    )),
    ("insult", "", (r"you are (?:a fool|stupid|greedy|a clown)|that is (?:stupid|a joke)|do not waste my time",)),
    ("threat", "", (r"take it or leave it|agree now or i go|tell me now or i go",)),
    ("object", "", (r"please be kind|that was not nice",)),
    ("small_talk", "", (
        r"the weather is (?:nice|fine) today|i slept well|this is a nice place|the bus was late",
    )),
    ("goodbye", "", (r"goodbye|bye|see you soon",)),
)  # fmt: skip
_COMPILED = tuple((kind, topic, re.compile(form)) for kind, topic, forms in _RULES for form in forms)
_SENTENCE = re.compile(r"[^.?!]+")


@lru_cache(maxsize=65536)
def understand(utterance: str) -> tuple[Act, ...]:
    """The speech acts of an utterance, in order; shares named in several sentences become one offer.

    A sentence that no rule knows gives an `unknown` act. A leading or final "please" is a courtesy.
    """
    acts: list[Act] = []
    mine: frozenset[str] = frozenset()
    yours: frozenset[str] = frozenset()
    for raw in _SENTENCE.findall(utterance):
        sentence = " ".join(raw.lower().split())
        if not sentence:
            continue
        polite = re.sub(r"^(?:sorry|please),? (?!be kind)|,? please$", "", sentence)
        if polite != sentence:
            acts.append(Act("courtesy"))
        act = _sentence(polite)
        if act.kind == "offer" and isinstance(act.value, tuple):
            mine, yours = mine | act.value[0], yours | act.value[1]
        elif act != _REST:
            acts.append(act)
    if mine & yours:
        acts.append(Act("unknown"))
    elif mine or yours:
        acts.append(Act("offer", "items", (mine, yours)))
    return tuple(acts) or (Act("unknown"),)


_REST = Act("offer", "rest_yours")


def _sentence(sentence: str) -> Act:
    for kind, topic, pattern in _COMPILED:
        found = pattern.fullmatch(sentence)
        if found:
            return _act(kind, topic, {k: v for k, v in found.groupdict().items() if v is not None})
    return Act("unknown")


def _act(kind: Kind, topic: str, named: dict[str, str]) -> Act:
    if "items" in named:
        items = frozenset(re.findall(_ITEM, named["items"]))
        return Act("offer", "items", (items, frozenset()) if topic == "mine" else (frozenset(), items))
    if "price" in named:
        return Act(kind, topic, int(named["price"]))
    for name in ("day", "kept"):
        if name in named:
            return Act(kind, topic, _CANON[named[name]])
    return Act(kind, topic, next(iter(named.values()), None))
