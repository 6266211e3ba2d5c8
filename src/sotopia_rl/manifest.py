"""What an evaluation plays: a frozen list of matches with a hash, and who meets whom in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, ValidationError, model_validator

from sotopia_rl.episode import AgentSpec, Match, Record, canonical_json, sha256_text
from sotopia_rl.errors import DataError
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
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
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


def evaluation_pairings(manifest: Manifest, system: AgentSpec, partners: Sequence[AgentSpec]) -> list[Pairing]:
    """Every match of the manifest against every partner, the system in the seat that the match names."""
    return [
        Pairing(match=match, agents=(system, partner) if match.seat == 0 else (partner, system))
        for match in manifest.matches
        for partner in partners
    ]
