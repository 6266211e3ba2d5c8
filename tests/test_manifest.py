"""Manifests by name and from one's own YAML, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sotopia_data import FOLDER, needs_sotopia_data
from sotopia_rl.cli import main
from sotopia_rl.config import parse_config
from sotopia_rl.errors import ConfigError
from sotopia_rl.manifest import Recipe, load_manifest

OWN = """
name: market
seeds: [0, 1]
characters:
  ann: {first_name: Ann, last_name: O'Lee, occupation: Potter}
  ben: {first_name: Ben, last_name: Ito}
scenarios:
  bicycle: {description: "Ann sells a bicycle; Ben wants one.", goals: [Sell it for 50, Pay at most 60]}
meet: [[bicycle, ann, ben]]
"""


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def test_ones_own_yaml_is_frozen_with_both_seats_and_every_seed(own, tmp_path, capsys):
    assert call("manifest", "freeze", own, "--output", tmp_path / "own.json") == 0
    frozen = load_manifest(tmp_path / "own.json")
    assert sorted((m.seat, m.seed) for m in frozen.matches) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [c.name for c in frozen.matches[0].characters] == ["Ann O'Lee", "Ben Ito"]
    assert frozen.sha256 in capsys.readouterr().out
    assert json.loads((tmp_path / "own.json").read_text())["sha256"] == frozen.sha256


def test_a_frozen_manifest_is_not_replaced_by_another(own, tmp_path, capsys):
    assert call("manifest", "freeze", own, "--output", tmp_path / "m.json") == 0
    assert call("manifest", "freeze", own, "--output", tmp_path / "m.json") == 0
    assert call("manifest", "freeze", "sandbox-held-out", "--output", tmp_path / "m.json") == 2
    assert "other matches; choose another file" in capsys.readouterr().err


def test_show_names_every_scenario_and_every_match(own, capsys):
    assert call("manifest", "show", own) == 0
    assert "market: 4 matches in 1 scenarios, first seat 2, second seat 2, seeds 0, 1" in capsys.readouterr().out
    assert call("manifest", "show", own, "--matches") == 0
    assert "*Ann O'Lee and Ben Ito" in capsys.readouterr().out


def test_a_manifest_that_was_changed_is_refused(own, tmp_path, capsys):
    call("manifest", "freeze", own, "--output", tmp_path / "m.yaml")
    path = tmp_path / "m.yaml"
    path.write_text(path.read_text().replace("Potter", "Baker"))
    assert call("manifest", "show", path) == 1
    assert "changed after it was frozen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[bicycle, ann, ben]]", "[[bicycle, ann, bob]]"), "meet names 'bob', which is not defined"),
        (("name: market", "nmae: market"), "unknown key, did you mean 'name'?"),
        (("meet: [[bicycle, ann, ben]]", ""), "no match in it"),
        (("seeds: [0, 1]", "benchmark: sotopia-hard"), "give their folder: --profiles"),
    ],
)
def test_a_wrong_yaml_is_named_in_one_line(own, change, message, capsys):
    own.write_text(OWN.replace(*change))
    assert call("manifest", "show", own) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_name_that_is_nearly_right_is_suggested(capsys):
    assert call("manifest", "show", "sotopia-hrad") == 2
    assert "did you mean sotopia-hard?" in capsys.readouterr().err


def test_the_list_states_the_sizes_that_people_report(capsys):
    assert call("manifest", "list") == 0
    lines = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines() if "sotopia-" in line}
    assert lines["sotopia-hard-14x2"] == ["14", "28"]
    assert lines["sotopia-hard-14x10"] == lines["sotopia-hard-70x2"] == ["14", "140"]
    assert lines["sotopia-all-90x2"] == ["90", "180"]
    assert lines["sotopia-all-450x2"] == ["90", "900"]


@needs_sotopia_data
def test_the_listed_sizes_are_those_of_the_published_profiles(tmp_path):
    for name, size in (("sotopia-hard-14x2", 28), ("sotopia-hard-70x2", 140)):
        path = tmp_path / f"{name}.json"
        assert call("manifest", "freeze", name, "--profiles", FOLDER, "--output", path) == 0
        assert len(load_manifest(path).matches) == size


def test_a_recipe_of_published_scenarios_needs_the_profiles():
    recipe = parse_config(Recipe, {"name": "x", "scenario_ids": ["a"]}, where="x")
    with pytest.raises(ConfigError, match="--profiles"):
        recipe.freeze(None)
