"""What an evaluation plays: a frozen list of matches with a hash, and who meets whom in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from sotopia_rl.config import parse_config, parse_yaml, read_yaml
from sotopia_rl.episode import AgentSpec, Character, Match, Record, Scenario, Seat, canonical_json, sha256_text
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.profiles import Profiles, benchmark_ids, load_profiles
from sotopia_rl.profiles import matches as published_matches
from sotopia_rl.simulate import Pairing


class Manifest(Record):
    """A frozen list of matches. Two systems are comparable when their manifests' hashes are equal."""

    name: str = Field(min_length=1)
    matches: tuple[Match, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _no_match_twice(self) -> Self:
        twice = [match_id for match_id, count in Counter(m.id for m in self.matches).items() if count > 1]
        if twice:
            raise ValueError(f"{len(twice)} matches stand in it more than once, first {twice[0]}")
        return self

    @property
    def sha256(self) -> str:
        """Of the matches in their order; the name does not count."""
        return sha256_text(canonical_json([m.model_dump(mode="json") for m in self.matches]))

    @property
    def num_scenarios(self) -> int:
        return len({m.scenario.id for m in self.matches})

    def __str__(self) -> str:
        return f"{self.name} ({len(self.matches)} matches, {self.sha256[:12]})"

    def save(self, path: Path) -> None:
        """Write it with its hash, as JSON where the name ends in `.json`, else as YAML."""
        data = {"name": self.name, "sha256": self.sha256, "matches": [m.model_dump(mode="json") for m in self.matches]}
        if path.suffix == ".json":
            text = json.dumps(data, ensure_ascii=False, indent=1)
        else:
            text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
        path.write_text(text, encoding="utf-8")


def load_manifest(path: Path) -> Manifest:
    """Read a manifest that `Manifest.save` wrote and check its hash.

    A file without `sha256` (one's own, from YAML) is taken as it stands; saving it freezes it.

    Raises:
        DataError: The file cannot be read, is no manifest, or its matches do not have the hash it states.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not a manifest ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: not a manifest: expected name, sha256 and matches, found {type(data).__name__}")
    stated = data.pop("sha256", None)
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"]) or "top level"
        raise DataError(f"{path}: not a manifest: {location}: {first['msg']}") from error
    if stated is not None and stated != manifest.sha256:
        raise DataError(
            f"{path}: its matches hash to {manifest.sha256[:12]}, but it states {str(stated)[:12]}; "
            "it was changed after it was frozen: restore it, or drop the sha256 line and use it as a new manifest"
        )
    return manifest


class _Person(Character):
    id: str = ""


class _Place(Scenario):
    id: str = ""


class Recipe(Record):
    """One's own manifest in short, as a YAML file: which matches to make, from published profiles or from new people.

    name: market
    seeds: [0, 1]
    benchmark: sotopia-hard        # or scenario_ids: [...]; both from published profiles
    characters:
      ann: {first_name: Ann, last_name: Lee, occupation: Potter}
      ben: {first_name: Ben, last_name: Ito}
    scenarios:
      bicycle: {description: "Ann sells a bicycle; Ben wants one.", goals: [Sell it for 50, Pay at most 60]}
    meet: [[bicycle, ann, ben]]
    """

    name: str = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Every match is played once per seed."""
    both_seats: bool = True
    """The system under test plays the first character, then the second; else the first only."""
    benchmark: str | None = None
    """A published list of scenarios: sotopia-hard or sotopia-all."""
    scenario_ids: tuple[str, ...] = ()
    """Of the published profiles."""
    combos: Literal["first", "all"] = "first"
    """Which of a published scenario's pairs of characters."""
    characters: dict[str, _Person] = Field(default={})
    scenarios: dict[str, _Place] = Field(default={})
    meet: tuple[tuple[str, str, str], ...] = ()
    """Of the new ones: scenario, first character, second character."""

    @property
    def needs_profiles(self) -> bool:
        return self.benchmark is not None or bool(self.scenario_ids)

    def freeze(self, profiles: Profiles | None) -> Manifest:
        """The matches it stands for.

        Raises:
            ConfigError: It needs profiles and has none, or names somebody that it does not define.
            DataError: The profiles lack a scenario.
        """
        matches = [*self._published(profiles), *self._own()]
        if not matches:
            raise ConfigError(f"{self.name}: no match in it; give benchmark, scenario_ids or meet")
        return Manifest(name=self.name, matches=tuple(matches))

    def _published(self, profiles: Profiles | None) -> list[Match]:
        if not self.needs_profiles:
            return []
        if profiles is None:
            raise ConfigError(f"{self.name} is played in the published SOTOPIA profiles; give their folder: --profiles")
        ids = [*(benchmark_ids(self.benchmark) if self.benchmark else ()), *self.scenario_ids]
        return published_matches(profiles, ids, combos=self.combos, both_seats=self.both_seats, seeds=self.seeds)

    def _own(self) -> list[Match]:
        seats: tuple[Seat, ...] = (0, 1) if self.both_seats else (0,)
        found = []
        for place, first, second in self.meet:
            for name, known in ((place, self.scenarios), (first, self.characters), (second, self.characters)):
                if name not in known:
                    raise ConfigError(
                        f"{self.name}: meet names {name!r}, which is not defined; there are {sorted(known)}"
                    )
            scenario = Scenario(**{**self.scenarios[place].model_dump(), "id": place})
            one, two = (Character(**{**self.characters[name].model_dump(), "id": name}) for name in (first, second))
            found += [Match.of(scenario, (one, two), seat=seat, seed=seed) for seat in seats for seed in self.seeds]
        return found


def manifest_from(path: Path, profiles: Path | None) -> Manifest:
    """A manifest from a file: one that was frozen, or a `Recipe`.

    Raises:
        ConfigError: A recipe is wrong, or needs profiles.
        DataError: As `load_manifest`.
    """
    if path.suffix not in {".yaml", ".yml"} or not path.is_file():
        return load_manifest(path)
    data = read_yaml(path)
    if "matches" in data:
        return load_manifest(path)
    recipe = parse_config(Recipe, data, where=str(path))
    return recipe.freeze(load_profiles(profiles) if profiles and recipe.needs_profiles else None)


def seated(match: Match, system: AgentSpec, partner: AgentSpec) -> Pairing:
    """The system in the seat that the match names, the partner in the other."""
    return Pairing(match=match, agents=(system, partner) if match.seat == 0 else (partner, system))


def evaluation_pairings(manifest: Manifest, system: AgentSpec, partners: Sequence[AgentSpec]) -> list[Pairing]:
    """Every match of the manifest against every partner."""
    return [seated(match, system, partner) for match in manifest.matches for partner in partners]
