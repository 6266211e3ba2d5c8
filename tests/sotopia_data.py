"""The published SOTOPIA profiles and golden files, where they are at hand."""

import json
import os
from functools import cache
from pathlib import Path

import pytest

from sotopia_rl.episode import Match
from sotopia_rl.profiles import load_profiles

FOLDER = Path(os.environ.get("SOTOPIA_DATA") or Path(__file__).parent.parent.parent / "shared/data/sotopia")
needs_sotopia_data = pytest.mark.skipif(
    not (FOLDER / "golden").is_dir(), reason=f"no SOTOPIA profiles in {FOLDER}; set SOTOPIA_DATA"
)


@cache
def profiles():
    return load_profiles(FOLDER)


def golden(name):
    return json.loads((FOLDER / "golden" / name).read_text(encoding="utf-8"))


def match_of_combo(combo_id):
    combo = next(combo for combo in profiles().combos if combo.id == combo_id)
    return match_of(combo.scenario_id, *combo.character_ids)


def match_of(scenario_id, first_id, second_id):
    characters = profiles().characters
    return Match.of(profiles().scenarios[scenario_id], (characters[first_id], characters[second_id]))
