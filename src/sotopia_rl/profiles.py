"""Published SOTOPIA profiles: from a folder of JSONL files to characters, scenarios and matches.

The folder holds `agent_profiles.jsonl`, `environment_profiles.jsonl`, `env_agent_combo_storages.jsonl` and
`relationship_profiles.jsonl`. Their texts are kept to the character, tags and trailing spaces included:
prompts are rendered from them. Only the id is a key: codenames repeat, and names are for display.
A manifest (a frozen list of matches with a hash) is made of these matches in `manifest.py`.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sotopia_rl.episode import Character, Match, Scenario, Seat
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.files import read_text

AGENTS = "agent_profiles.jsonl"
ENVIRONMENTS = "environment_profiles.jsonl"
COMBOS = "env_agent_combo_storages.jsonl"
RELATIONSHIPS = "relationship_profiles.jsonl"

SEATS: tuple[Seat, ...] = (0, 1)

Row = TypeVar("Row", bound="_Row")
Built = TypeVar("Built")


@dataclass(frozen=True)
class Combo:
    """A published choice of two characters for a scenario, by seat."""

    id: str
    scenario_id: str
    character_ids: tuple[str, str]


@dataclass(frozen=True)
class Relationship:
    """How two characters know each other. A pair may have several records, and they may disagree.

    What an agent sees depends on the scenario's own `relationship`, never on these.
    """

    id: str
    character_ids: tuple[str, str]
    relationship: int
    """Index into `episode.RELATIONSHIPS`."""
    background_story: str
    """Empty where none was published."""


@dataclass(frozen=True)
class Selection:
    """What a published size of a benchmark plays; always in both seats."""

    benchmark: str
    combos: Literal["first", "all"] = "first"
    num_seeds: int = 1


SELECTIONS = {
    "sotopia-hard": Selection("sotopia-hard"),
    "sotopia-hard-14x10": Selection("sotopia-hard", num_seeds=5),
    "sotopia-hard-70x2": Selection("sotopia-hard", combos="all"),
    "sotopia-all": Selection("sotopia-all"),
    "sotopia-all-450x2": Selection("sotopia-all", combos="all"),
    "sotopia-hard-14x2": Selection("sotopia-hard"),
    "sotopia-all-90x2": Selection("sotopia-all"),
}
"""By name: 28 matches (what the paper's evaluation command plays), 140, 140, 180 and 900.

The last two are other names of the 28 and the 180.
"""


@dataclass(frozen=True)
class Profiles:
    """Everything in a folder of profiles. `combos` are in order of their ids."""

    characters: Mapping[str, Character]
    scenarios: Mapping[str, Scenario]
    combos: tuple[Combo, ...]
    relationships: tuple[Relationship, ...]

    def combos_of(self, scenario_id: str) -> tuple[Combo, ...]:
        """The combos of one scenario, lowest id first."""
        return tuple(combo for combo in self.combos if combo.scenario_id == scenario_id)

    def between(self, first_id: str, second_id: str) -> tuple[Relationship, ...]:
        """All records on a pair, whichever way round it was published."""
        pair = {first_id, second_id}
        return tuple(r for r in self.relationships if set(r.character_ids) == pair)


def load_profiles(folder: Path) -> Profiles:
    """Read and cross-check a folder of profiles.

    Raises:
        DataError: A file is missing or unreadable, a line is torn, lacks a field or repeats an id, or a
            record names a character or scenario that no other file defines. Names the file and line.
    """
    characters: dict[str, Character] = {}
    for where, agent in _rows(folder / AGENTS, _AgentRow):
        _add(characters, where, agent.agent_id, agent.character())
    scenarios: dict[str, Scenario] = {}
    for where, environment in _rows(folder / ENVIRONMENTS, _EnvironmentRow):
        _add(scenarios, where, environment.env_id, environment.scenario_record())
    combos: dict[str, Combo] = {}
    for where, combo in _rows(folder / COMBOS, _ComboRow):
        _check_known(where, "scenario", scenarios, combo.env_id)
        _check_known(where, "character", characters, *combo.agent_ids)
        _add(combos, where, combo.combo_id, Combo(combo.combo_id, combo.env_id, combo.agent_ids))
    relationships: dict[str, Relationship] = {}
    for where, row in _rows(folder / RELATIONSHIPS, _RelationshipRow):
        _check_known(where, "character", characters, row.agent1_id, row.agent2_id)
        _add(relationships, where, row.relationship_id, row.record())
    in_order = tuple(combos[combo_id] for combo_id in sorted(combos))
    return Profiles(characters, scenarios, in_order, tuple(relationships.values()))


def matches(
    profiles: Profiles,
    scenario_ids: Sequence[str] | None = None,
    *,
    combos: Literal["first", "all"] = "first",
    both_seats: bool = True,
    seeds: Sequence[int] = (0,),
) -> list[Match]:
    """The matches of some scenarios, ordered by scenario, combo, seat of the system under test, seed.

    Both seats means that each combo is played twice by the same characters in the same order: once the
    system under test acts for the first character (`seat` 0), once for the second (`seat` 1).

    Args:
        scenario_ids: In the order to play them; all of the profiles' scenarios by default.
        combos: `first` is the lowest id of each scenario, as in the paper's evaluation command.

    Raises:
        DataError: A scenario is not among the profiles, or has no combo.
    """
    return [
        Match.of(profiles.scenarios[combo.scenario_id], _pair(profiles, combo), seat=seat, seed=seed)
        for scenario_id in (profiles.scenarios if scenario_ids is None else scenario_ids)
        for combo in _chosen(profiles, scenario_id, combos)
        for seat in (SEATS if both_seats else SEATS[:1])
        for seed in seeds
    ]


def selected_matches(profiles: Profiles, name: str, *, seed: int = 0) -> list[Match]:
    """The matches of a published benchmark in a published size, a name of `SELECTIONS`.

    Raises:
        ConfigError: The name is unknown.
        DataError: The profiles lack a scenario of the benchmark.
    """
    if name not in SELECTIONS:
        raise ConfigError(f"no benchmark is called {name!r}; there are {', '.join(SELECTIONS)}")
    chosen = SELECTIONS[name]
    seeds = range(seed, seed + chosen.num_seeds)
    return matches(profiles, benchmark_ids(chosen.benchmark), combos=chosen.combos, seeds=seeds)


def split_matches(
    folder: Path, *, train: int, held_out: int, validation: int = 0, seed: int = 0
) -> tuple[list[Match], list[Match], list[Match]]:
    """Matches to train on, to look at while training, and to evaluate on: no two share a scenario.

    Held out are the scenarios of sotopia-hard that the folder has; a folder without any of them loses a fifth
    of its scenarios to the held-out side, drawn by `seed`. No wording of theirs is left on the other sides. A tenth
    of the rest, at least one, is for validation where any is asked for. Every list plays each of its scenarios once,
    in both seats, before any scenario's second combo, and starts again with the next seed when all combos are used up.

    Returns:
        `train`, `validation` and `held_out` matches.

    Raises:
        DataError: As `load_profiles`, or nothing is left on one side.
    """
    profiles = load_profiles(folder)
    rng = random.Random(seed)
    playable = sorted({combo.scenario_id for combo in profiles.combos})
    apart = [i for i in benchmark_ids("sotopia-hard") if i in set(playable)]
    apart = apart or rng.sample(playable, max(1, len(playable) // 5))
    told_apart = {profiles.scenarios[scenario_id].description for scenario_id in apart}
    rest = [i for i in playable if profiles.scenarios[i].description not in told_apart]
    rng.shuffle(rest)
    size = max(1, len(rest) // 10) if validation else 0
    looked_at, trained_on = rest[len(rest) - size :], rest[: len(rest) - size]
    if not trained_on:
        raise DataError(f"{folder}: all its scenarios are held out, none is left to train on; give it more scenarios")
    return (
        _spread(profiles, trained_on, train, seed),
        _spread(profiles, looked_at, validation, seed) if validation else [],
        _spread(profiles, apart, held_out, seed),
    )


def _spread(profiles: Profiles, scenario_ids: Sequence[str], count: int, first_seed: int) -> list[Match]:
    """`count` matches that use every scenario before any is used again."""
    combos = [profiles.combos_of(scenario_id) for scenario_id in scenario_ids]
    in_turn = [combo for rank in itertools.zip_longest(*combos) for combo in rank if combo is not None]
    endless = (
        Match.of(profiles.scenarios[combo.scenario_id], _pair(profiles, combo), seat=seat, seed=seed)
        for seed in itertools.count(first_seed)
        for combo in in_turn
        for seat in SEATS
    )
    return list(itertools.islice(endless, count))


def benchmarks() -> dict[str, tuple[str, ...]]:
    """Scenario ids of the published benchmarks, by name: `sotopia-hard` (14) and `sotopia-all` (90)."""
    text = (files("sotopia_rl") / "data" / "benchmarks.yaml").read_text(encoding="utf-8")
    return {name: tuple(ids) for name, ids in yaml.safe_load(text).items()}


def benchmark_ids(name: str) -> tuple[str, ...]:
    """Scenario ids of one published benchmark.

    Raises:
        ConfigError: There is no benchmark of that name.
    """
    known = benchmarks()
    if name not in known:
        raise ConfigError(f"no benchmark is called {name!r}; there are {', '.join(known)}")
    return known[name]


def _pair(profiles: Profiles, combo: Combo) -> tuple[Character, Character]:
    first, second = combo.character_ids
    return profiles.characters[first], profiles.characters[second]


def _chosen(profiles: Profiles, scenario_id: str, combos: Literal["first", "all"]) -> tuple[Combo, ...]:
    if scenario_id not in profiles.scenarios:
        raise DataError(f"scenario {scenario_id!r} is not among the {len(profiles.scenarios)} of the profiles")
    found = profiles.combos_of(scenario_id)
    if not found:
        raise DataError(f"scenario {scenario_id!r} has no combo: {COMBOS} names no characters for it")
    return found[:1] if combos == "first" else found


class _Row(BaseModel):
    """A line as published. Keys unknown here are ignored: some copies add `tag` or `model_id`."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class CharacterFields(_Row):
    """What a published profile says of a character, its id apart."""

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


class _AgentRow(CharacterFields):
    agent_id: str = Field(min_length=1)

    def character(self) -> Character:
        lists = ("moral_values", "schwartz_personal_values")  # published as ["Care", " Fairness"]
        stripped = {name: tuple(value.strip() for value in getattr(self, name)) for name in lists}
        return Character(id=self.agent_id, **{**self.model_dump(exclude={"agent_id"}), **stripped})


class _EnvironmentRow(_Row):
    env_id: str = Field(min_length=1)
    codename: str = ""
    source: str = ""
    scenario: str
    agent_goals: tuple[str, str]
    relationship: int = Field(ge=0, le=5)
    age_constraint: str = ""
    occupation_constraint: str = ""
    agent_constraint: str = ""

    def scenario_record(self) -> Scenario:
        return Scenario(
            id=self.env_id,
            codename=self.codename,
            source=self.source,
            description=self.scenario,
            goals=self.agent_goals,
            relationship=self.relationship,
            age_constraint=_given(self.age_constraint),
            occupation_constraint=_given(self.occupation_constraint),
            agent_constraint=_given(self.agent_constraint),
        )


class _ComboRow(_Row):
    combo_id: str = Field(min_length=1)
    env_id: str
    agent_ids: tuple[str, str]


class _RelationshipRow(_Row):
    relationship_id: str = Field(min_length=1)
    agent1_id: str
    agent2_id: str
    relationship: int = Field(ge=0, le=5)
    background_story: str = ""

    def record(self) -> Relationship:
        pair = (self.agent1_id, self.agent2_id)
        return Relationship(self.relationship_id, pair, self.relationship, _given(self.background_story))


def _given(text: str) -> str:
    """Published tables say `nan` or `none` where nothing is given."""
    return "" if text in ("nan", "none") else text


def _add(records: dict[str, Built], where: str, record_id: str, record: Built) -> None:
    if record_id in records:
        raise DataError(f"{where}: id {record_id!r} is there twice")
    records[record_id] = record


def _check_known(where: str, what: str, known: Mapping[str, object], *ids: str) -> None:
    for record_id in ids:
        if record_id not in known:
            raise DataError(f"{where}: {what} {record_id!r} is defined in no file of the folder")


def _rows(path: Path, row_type: type[Row]) -> Iterator[tuple[str, Row]]:
    """(`file:line`, row) of every line of a file that is not blank."""
    # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
    lines = read_text(path).split("\n")
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: no record in it")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, row_type.model_validate(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not whole JSON ({error.msg}, column {error.colno}); is it torn?") from error
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc'])) or 'line'}: {e['msg']}" for e in error.errors())
            raise DataError(f"{where}: {'; '.join(problems)}") from error
