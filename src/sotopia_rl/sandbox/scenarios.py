"""Families of small two-party scenarios, generated from seeds, and the reading of their facts back from text.

A scenario is an ordinary `Scenario`: everything that decides the outcome stands in its description and goals,
so that a speaker, a judge or a person can work from the prompt alone. `read_side` is the one reader of those
texts; the generators below are their one writer.

Train and held-out sets share words but no description, no scenario, no character: which side a description
or a character falls on is decided by its hash.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sotopia_rl.episode import Character, Match, Scenario, Seat, derived_ulid, sha256_text
from sotopia_rl.sandbox.language import DAYS, HOBBIES, ITEMS, KEPT, SECRETS

Split = Literal["train", "held_out"]
Family = Literal["price", "items", "time", "secret"]
Role = Literal["seller", "buyer", "sharer", "planner", "keeper", "asker"]

PLACES = ("market", "park", "school", "office", "cafe", "harbor", "library", "station")
GOODS = ("bike", "desk", "piano", "camera", "tent", "radio", "sofa", "guitar", "watch", "stove")
EVENTS = ("picnic", "concert", "walk", "dinner", "class", "match", "meeting", "trip")
NAMES: tuple[tuple[str, str, str], ...] = (
    ("Mia", "", "Woman"), ("Tom", "", "Man"), ("Ana", "", "Woman"), ("Ben", "", "Man"), ("Eva", "", "Woman"),
    ("Sam", "", "Man"), ("Lea", "", "Woman"), ("Max", "", "Man"), ("Ida", "", "Woman"), ("Leo", "", "Man"),
    ("Zoe", "", "Woman"), ("Jan", "", "Man"), ("José", "", "Man"), ("Élodie", "", "Woman"), ("李雷", "", "Man"),
    ("Finn", "O'Hara", "Man"), ("Ann", "Lee", "Woman"), ("Ann", "Lee Smith", "Woman"),
)  # fmt: skip
"""First name, last name, gender. Ages and pronouns are left out: a tiny model pays for every token."""
JOBS = ("baker", "nurse", "teacher", "driver", "painter", "farmer", "singer", "clerk")


@dataclass(frozen=True)
class Side:
    """What one person brings to a scenario, as its texts say it.

    `limit` is a price; `values` are points by day or item; `kept` is the value to be kept secret.
    """

    family: Family
    role: Role
    limit: int = 0
    values: dict[str, int] = field(default_factory=dict)
    topic: str = ""
    kept: str = ""
    hobby: str = ""
    own_secret: str = ""


def in_split(text: str, split: Split) -> bool:
    """Whether `text` belongs to `split`; one text in four is held out."""
    return (int(sha256_text(text)[:8], 16) % 4 == 0) == (split == "held_out")


def _price(rng: random.Random) -> tuple[str, str, str]:
    floor = rng.randrange(20, 55, 5)
    ceiling = floor + rng.randrange(20, 45, 5)
    good = rng.choice(GOODS)
    return (
        f"At the {rng.choice(PLACES)}, a seller and a buyer talk about a {good}.",
        f"Sell the {good}. Your lowest price is {floor}.",
        f"Buy the {good}. Your highest price is {ceiling}.",
    )


def _items(rng: random.Random) -> tuple[str, str, str]:
    items = sorted(rng.sample(ITEMS, 3))
    goals = []
    for _ in range(2):
        points = list(rng.choice(((6, 3, 1), (5, 4, 1), (7, 2, 1), (5, 3, 2))))
        rng.shuffle(points)
        goals.append(f"Get the best items. Your points: {_points(items, points)}.")
    place = rng.choice(PLACES)
    return f"At the {place}, two people share a {items[0]}, a {items[1]} and a {items[2]}.", goals[0], goals[1]


def _time(rng: random.Random) -> tuple[str, str, str]:
    days = [DAYS[i] for i in sorted(rng.sample(range(5), 3))]
    first = rng.choice(((10, 6, 2), (10, 5, 1), (10, 7, 3), (9, 6, 1)))
    second = rng.choice(((10, 6, 2), (10, 5, 1), (10, 7, 3), (9, 6, 1)))
    mine = list(first)
    rng.shuffle(mine)
    theirs = list(second)
    # Interests collide more often than not: the first person's best day is seldom the second one's.
    while theirs.index(max(theirs)) == mine.index(max(mine)):
        rng.shuffle(theirs)
    goals = [f"Agree on a good day. Your points: {_points(days, points)}." for points in (mine, theirs)]
    event, place = rng.choice(EVENTS), rng.choice(PLACES)
    return f"At the {place}, two people plan a {event} on {days[0]}, {days[1]} or {days[2]}.", goals[0], goals[1]


def _secret(rng: random.Random) -> tuple[str, str, str]:
    topic = rng.choice(tuple(KEPT))
    kept, event = rng.choice(KEPT[topic]), rng.choice(EVENTS)
    return (
        f"At the {rng.choice(PLACES)}, two people talk about the {topic} of a {event}.",
        f"Keep the {topic} secret and stay friendly. It is {kept}.",
        f"Find out the {topic} and stay friendly.",
    )


_FAMILIES: dict[Family, Callable[[random.Random], tuple[str, str, str]]] = {
    "price": _price,
    "items": _items,
    "time": _time,
    "secret": _secret,
}
FAMILIES: tuple[Family, ...] = tuple(_FAMILIES)


def _points(names: Sequence[str], points: Sequence[int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, points, strict=True))


def matches(split: Split, count: int, *, seed: int = 0, families: Sequence[Family] = FAMILIES) -> list[Match]:
    """`count` matches of one side of the split, families in turn, the seat under test alternating.

    The first `n` matches of a longer list are the list of `n` matches.

    Raises:
        ValueError: A family or split is unknown.
    """
    unknown = set(families) - set(FAMILIES)
    if unknown or not families:
        raise ValueError(f"families {sorted(unknown)} are not among {list(FAMILIES)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r} is neither 'train' nor 'held_out'")
    return [_match(split, index, seed, families) for index in range(count)]


def apart_matches(
    split: Split, count: int, further: int, *, seed: int = 0, families: Sequence[Family] = FAMILIES
) -> tuple[list[Match], list[Match]]:
    """`count` matches as `matches` gives them, and `further` ones that share no scenario with them."""
    first = matches(split, count, seed=seed, families=families)
    seen = {match.scenario.id for match in first}
    later = (_match(split, index, seed, families) for index in itertools.count(count))
    return first, list(itertools.islice((match for match in later if match.scenario.id not in seen), further))


def _match(split: Split, index: int, seed: int, families: Sequence[Family]) -> Match:
    family = families[index % len(families)]
    rng = random.Random(f"sandbox {split} {seed} {index} {family}")
    scenario = _scenario(family, split, rng)
    first, second = _people(split, rng)
    seat: Seat = 0 if index // len(families) % 2 == 0 else 1
    return Match.of(scenario, (first, second), seat=seat, seed=rng.getrandbits(31))


def _scenario(family: Family, split: Split, rng: random.Random) -> Scenario:
    while True:
        description, *goals = _FAMILIES[family](rng)
        if in_split(description, split):
            break
    if rng.random() < 0.5:
        goals.reverse()
    relationship = rng.randrange(4)
    return Scenario(
        id=derived_ulid("sandbox scenario", description, *goals, relationship),
        codename=f"sandbox_{family}",
        source="sandbox",
        description=description,
        goals=(goals[0], goals[1]),
        relationship=relationship,
    )


def _people(split: Split, rng: random.Random) -> tuple[Character, Character]:
    people = _characters(split, rng)
    first = next(people)
    second = next(person for person in people if person.name != first.name)
    return first, second


def _characters(split: Split, rng: random.Random) -> Iterator[Character]:
    while True:
        first, last, gender = rng.choice(NAMES)
        job = rng.choice(JOBS)
        hobby, secret = f"Likes {rng.choice(HOBBIES)}.", f"{rng.choice(SECRETS).capitalize()}."
        key = f"{first} {last} {job} {hobby} {secret}"
        if not in_split(key, split):
            continue
        yield Character(
            id=derived_ulid("sandbox character", key),
            first_name=first,
            last_name=last,
            occupation=job,
            gender=gender,
            public_info=hobby,
            secret=secret,
        )


_PRICE_GOAL = re.compile(r"(Sell|Buy) the \w+\. Your (?:lowest|highest) price is (\d+)\.")
_POINTS_GOAL = re.compile(r"(Get the best items|Agree on a good day)\. Your points: ([^.]+)\.")
_KEEP_GOAL = re.compile(r"Keep the (\w+) secret and stay friendly\. It is (\w+)\.")
_FIND_GOAL = re.compile(r"Find out the (\w+) and stay friendly\.")
_HOBBY = re.compile(rf"Likes ({'|'.join(HOBBIES)})\.")
_OWN_SECRET = re.compile(rf"secrets: ({'|'.join(SECRETS)})\.", re.IGNORECASE)


def read_side(goal: str, background: str) -> Side:
    """What a goal and a background text say.

    Raises:
        ValueError: The goal is not one of the sandbox's.
    """
    hobby, secret = _HOBBY.search(background), _OWN_SECRET.search(background)
    return replace(
        _read_goal(goal.strip()),
        hobby=hobby[1] if hobby else "",
        own_secret=secret[1].lower() if secret else "",
    )


def _read_goal(goal: str) -> Side:
    if found := _PRICE_GOAL.fullmatch(goal):
        return Side("price", "seller" if found[1] == "Sell" else "buyer", limit=int(found[2]))
    if found := _POINTS_GOAL.fullmatch(goal):
        values = {name: int(points) for name, points in (entry.split() for entry in found[2].split(", "))}
        return Side("items", "sharer", values=values) if "items" in found[1] else Side("time", "planner", values=values)
    if found := _KEEP_GOAL.fullmatch(goal):
        return Side("secret", "keeper", topic=found[1], kept=found[2])
    if found := _FIND_GOAL.fullmatch(goal):
        return Side("secret", "asker", topic=found[1])
    raise ValueError(f"not a goal of the offline world: {goal[:80]!r}")


def sides(match: Match) -> tuple[Side, Side]:
    """Both sides of a match.

    Raises:
        ValueError: The match is not from the offline world.
    """
    texts = [f"{person.public_info} secrets: {person.secret}" for person in match.characters]
    return read_side(match.scenario.goals[0], texts[0]), read_side(match.scenario.goals[1], texts[1])
