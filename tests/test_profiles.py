import json
from collections import Counter
from pathlib import Path

import pytest

from sotopia_data import FOLDER, needs_sotopia_data
from sotopia_data import profiles as published
from sotopia_rl.episode import Match
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.profiles import benchmark_ids, benchmarks, load_profiles, matches, selected_matches, split_matches

ANN = {"agent_id": "A1", "first_name": "Ann", "last_name": "O'Lee", "age": 30, "moral_values": ["Care", " Fairness"]}
BEN = {
    "agent_id": "A2",
    "first_name": "Ben",
    "last_name": "Ito",
    "public_info": "Ben runs. ",
    "model_id": "",
    "tag": "x",
}
CAT = {"agent_id": "A3", "first_name": "Cat", "last_name": "李"}
BARTER = {
    "env_id": "E1",
    "codename": "barter",
    "scenario": "At a fair \u2028 <p viewer='environment'>answer</p>",
    "agent_goals": ["Sell (<extra_info>cost 3</extra_info>)", "Buy"],
    "relationship": "3",
    "occupation_constraint": "nan",
    "agent_constraint": "none",
}
CHAT = {
    "env_id": "E2",
    "codename": "barter",
    "scenario": "In a train",
    "agent_goals": ["Talk", "Sleep"],
    "relationship": 0,
}
COMBOS = [
    {"combo_id": "C3", "env_id": "E1", "agent_ids": ["A2", "A3"]},
    {"combo_id": "C1", "env_id": "E1", "agent_ids": ["A1", "A2"]},
    {"combo_id": "C2", "env_id": "E2", "agent_ids": ["A3", "A1"]},
]
RELATIONS = [
    {"relationship_id": "R1", "agent1_id": "A1", "agent2_id": "A2", "relationship": "3", "background_story": "nan"},
    {"relationship_id": "R2", "agent1_id": "A2", "agent2_id": "A1", "relationship": "4", "background_story": "Met."},
]
TABLES: dict[str, list[dict[str, object]]] = {
    "agent_profiles": [ANN, BEN, CAT],
    "environment_profiles": [BARTER, CHAT],
    "env_agent_combo_storages": COMBOS,
    "relationship_profiles": RELATIONS,
}


def write(folder: Path, **replaced: list[dict[str, object]]) -> Path:
    for name, rows in {**TABLES, **replaced}.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def seats_of(played: list[Match]) -> list[tuple[str, str, int]]:
    return [(m.scenario.id, m.characters[0].id, m.seat) for m in played]


def test_texts_are_kept_to_the_character_and_placeholders_are_emptied(tmp_path):
    profiles = load_profiles(write(tmp_path))
    assert profiles.characters["A2"].public_info == "Ben runs. "
    assert profiles.characters["A1"].name == "Ann O'Lee"
    assert profiles.characters["A1"].moral_values == ("Care", "Fairness")
    barter = profiles.scenarios["E1"]
    assert barter.description == BARTER["scenario"]
    assert barter.goals == ("Sell (<extra_info>cost 3</extra_info>)", "Buy")
    assert (barter.relationship, barter.occupation_constraint, barter.agent_constraint) == (3, "", "")


def test_a_pair_may_have_two_conflicting_relationships(tmp_path):
    profiles = load_profiles(write(tmp_path))
    found = profiles.between("A2", "A1")
    assert [(r.id, r.relationship, r.background_story) for r in found] == [("R1", 3, ""), ("R2", 4, "Met.")]


def test_the_first_combo_is_the_lowest_id_and_both_seats_keep_the_order_of_the_characters(tmp_path):
    profiles = load_profiles(write(tmp_path))
    assert seats_of(matches(profiles)) == [("E1", "A1", 0), ("E1", "A1", 1), ("E2", "A3", 0), ("E2", "A3", 1)]


def test_all_combos_one_seat_and_several_seeds(tmp_path):
    profiles = load_profiles(write(tmp_path))
    played = matches(profiles, ["E1"], combos="all", both_seats=False, seeds=(5, 6))
    assert [(m.characters[0].id, m.seat, m.seed) for m in played] == [
        ("A1", 0, 5),
        ("A1", 0, 6),
        ("A2", 0, 5),
        ("A2", 0, 6),
    ]
    assert len({m.id for m in played}) == len(played)


def test_a_scenario_that_is_unknown_or_has_no_combo_is_refused(tmp_path):
    profiles = load_profiles(write(tmp_path, env_agent_combo_storages=COMBOS[:2]))
    with pytest.raises(DataError, match="'E9' is not among the 2 of the profiles"):
        matches(profiles, ["E9"])
    with pytest.raises(DataError, match="'E2' has no combo"):
        matches(profiles)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "agent_profiles.jsonl").unlink()
    with pytest.raises(DataError, match=r"agent_profiles\.jsonl: cannot be read \(No such file"):
        load_profiles(tmp_path)


def test_a_torn_line_is_named_with_its_number(tmp_path):
    write(tmp_path)
    path = tmp_path / "environment_profiles.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(DataError, match=r"environment_profiles\.jsonl:2: not whole JSON"):
        load_profiles(tmp_path)


@pytest.mark.parametrize(
    ("table", "rows", "message"),
    [
        ("agent_profiles", [], r"agent_profiles\.jsonl: no record in it"),
        ("agent_profiles", [ANN, BEN, CAT, ANN], r"agent_profiles\.jsonl:4: id 'A1' is there twice"),
        ("agent_profiles", [ANN, BEN], r"storages\.jsonl:1: character 'A3' is defined in no file"),
        ("agent_profiles", [{"agent_id": "A1", "first_name": "Ann"}], r"profiles\.jsonl:1: last_name: Field required"),
        ("environment_profiles", [BARTER], r"storages\.jsonl:3: scenario 'E2' is defined in no file"),
        ("environment_profiles", [{**BARTER, "agent_goals": ["one"]}], r"profiles\.jsonl:1: agent_goals"),
        ("environment_profiles", [{**BARTER, "relationship": "7"}], r"profiles\.jsonl:1: relationship: .*less than"),
        ("env_agent_combo_storages", [*COMBOS, COMBOS[0]], r"storages\.jsonl:4: id 'C3' is there twice"),
        (
            "relationship_profiles",
            [{**RELATIONS[0], "agent2_id": "A9"}],
            r"relationship_profiles\.jsonl:1: character 'A9'",
        ),
    ],
)
def test_bad_records_are_named_with_file_and_line(tmp_path, table, rows, message):
    with pytest.raises(DataError, match=message):
        load_profiles(write(tmp_path, **{table: rows}))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "agent_profiles.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_profiles(tmp_path)


def test_hard_is_a_subset_of_all():
    assert {name: len(ids) for name, ids in benchmarks().items()} == {"sotopia-hard": 14, "sotopia-all": 90}
    assert set(benchmark_ids("sotopia-hard")) < set(benchmark_ids("sotopia-all"))
    with pytest.raises(ConfigError, match="there are sotopia-hard, sotopia-all"):
        benchmark_ids("sotopia-easy")


def test_an_unknown_size_of_a_benchmark_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="there are sotopia-hard, sotopia-hard-14x10"):
        selected_matches(load_profiles(write(tmp_path)), "sotopia-hard-15x10")


@needs_sotopia_data
def test_the_published_profiles_load_whole():
    profiles = published()
    sizes = (profiles.characters, profiles.scenarios, profiles.combos, profiles.relationships)
    assert tuple(map(len, sizes)) == (40, 90, 450, 120)
    assert "Finnegan O'Malley" in {c.name for c in profiles.characters.values()}
    assert len({s.codename for s in profiles.scenarios.values()}) == 81
    pairs = {frozenset(r.character_ids) for r in profiles.relationships}
    assert len(pairs) == 118
    assert sum(not r.background_story for r in profiles.relationships) == 3


@needs_sotopia_data
@pytest.mark.parametrize(
    ("name", "num_matches", "per_scenario"),
    [
        ("sotopia-hard", 28, 2),
        ("sotopia-hard-14x10", 140, 10),
        ("sotopia-hard-70x2", 140, 10),
        ("sotopia-all", 180, 2),
        ("sotopia-all-450x2", 900, 10),
    ],
)
def test_the_benchmarks_have_the_published_numbers_of_matches(name, num_matches, per_scenario):
    played = selected_matches(published(), name)
    assert len({m.id for m in played}) == len(played) == num_matches
    assert set(Counter(m.scenario.id for m in played).values()) == {per_scenario}
    assert sum(m.seat for m in played) == num_matches // 2
    combos = {(m.scenario.id, m.characters[0].id, m.characters[1].id) for m in played}
    assert len(combos) == {"sotopia-hard-70x2": 70, "sotopia-all-450x2": 450}.get(name, num_matches // per_scenario)


@needs_sotopia_data
def test_sotopia_hard_is_held_out_and_its_first_matches_are_those_of_the_paper():
    train, _, held_out = split_matches(FOLDER, train=400, held_out=28, seed=1)
    hard = benchmark_ids("sotopia-hard")
    assert [m.id for m in held_out] == [m.id for m in matches(published(), hard, seeds=(1,))]
    assert not {m.scenario.id for m in train} & set(hard)
    assert not {m.scenario.description for m in train} & {m.scenario.description for m in held_out}
    assert len({m.id for m in train}) == 400


def test_own_profiles_are_split_by_scenario_and_repeat_with_the_next_seed(tmp_path):
    train, _, held_out = split_matches(write(tmp_path), train=9, held_out=3, seed=4)
    assert (len(train), len(held_out)) == (9, 3)
    assert len({m.scenario.id for m in train}) == len({m.scenario.id for m in held_out}) == 1
    assert train[0].scenario.id != held_out[0].scenario.id
    assert len({m.id for m in train}) == 9
    assert train[0].seed == held_out[0].seed == 4
    assert train[-1].seed > 4


def test_a_folder_of_one_scenario_cannot_be_split(tmp_path):
    folder = write(tmp_path, environment_profiles=[BARTER], env_agent_combo_storages=COMBOS[:2])
    with pytest.raises(DataError, match="none is left to train on"):
        split_matches(folder, train=1, held_out=1)
