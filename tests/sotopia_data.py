"""The published SOTOPIA profiles and golden files, where they are at hand."""

import json
import os
from functools import cache
from pathlib import Path

import pytest

from sotopia_rl.episode import Character, Match, Scenario

FOLDER = Path(os.environ.get("SOTOPIA_DATA") or Path(__file__).parent.parent.parent / "shared/data/sotopia")
needs_sotopia_data = pytest.mark.skipif(
    not (FOLDER / "golden").is_dir(), reason=f"no SOTOPIA profiles in {FOLDER}; set SOTOPIA_DATA"
)


def golden(name):
    return json.loads((FOLDER / "golden" / name).read_text(encoding="utf-8"))


@cache
def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def character(agent_id):
    row = dict(next(row for row in rows("agent_profiles") if row["agent_id"] == agent_id))
    return Character(id=row.pop("agent_id"), **row)


def scenario(env_id):
    row = next(row for row in rows("environment_profiles") if row["env_id"] == env_id)
    return Scenario(
        id=env_id,
        codename=row["codename"],
        description=row["scenario"],
        goals=tuple(row["agent_goals"]),
        relationship=int(row["relationship"]),
    )


def match_of_combo(combo_id):
    combo = next(row for row in rows("env_agent_combo_storages") if row["combo_id"] == combo_id)
    first, second = combo["agent_ids"]
    return Match.of(scenario(combo["env_id"]), (character(first), character(second)))
