"""The Redis store on a real Redis, and with the real sotopia 0.1.4 on the other side (slow)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from real_redis import needs_redis, redis_server
from sotopia_data import FOLDER, needs_sotopia_data, profiles
from sotopia_rl.episode import Match
from sotopia_rl.errors import DamagedRecordError, StoreError
from sotopia_rl.store import copy, export_file, import_file, open_store
from sotopia_rl.store.sotopia_redis import EPISODE_LOG, schema
from sotopia_rl.store.sotopia_write import line_document, log_document
from store_samples import FAILURE, attribution, episode, rating

redis = pytest.importorskip("redis", reason="the redis extra is not installed")
pytestmark = needs_redis

TESTS = Path(__file__).parent
SOTOPIA = TESTS.parent / ".venvs" / "sotopia014" / "bin" / "python"
needs_sotopia = pytest.mark.skipif(
    not SOTOPIA.exists(), reason="no sotopia 0.1.4; run: python tests/oracle/install.py sotopia014"
)
GOLDEN = FOLDER / "golden"


@pytest.fixture(scope="module")
def server():
    with redis_server() as url:
        yield url


@pytest.fixture
def db(server):
    with redis.Redis.from_url(server, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def store(server, db):
    assert not db.keys()
    with open_store(server) as opened:
        yield opened


def log_in(db, episode_id):
    text = db.execute_command("JSON.GET", EPISODE_LOG + episode_id)
    return json.loads(text) if text else None


def oracle(url, *arguments):
    """What sotopia 0.1.4 answers, in a process and environment of its own."""
    env = {**os.environ, "REDIS_OM_URL": url, "OPENAI_API_KEY": "unused", "PYTHONWARNINGS": "ignore"}
    env.pop("PYTHONPATH", None)
    command = [str(SOTOPIA), str(TESTS / "oracle" / "sotopia014.py"), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def real_episodes(count=6):
    """Episodes over published profiles, one of them over a name with an apostrophe."""
    combos = [c for c in profiles().combos if c.scenario_id in sorted(profiles().scenarios)[:4]][: count - 1]
    combos += [
        c for c in profiles().combos if "O'Malley" in {profiles().characters[i].last_name for i in c.character_ids}
    ][:1]
    for number, combo in enumerate(combos):
        pair = tuple(profiles().characters[i] for i in combo.character_ids)
        match = Match.of(profiles().scenarios[combo.scenario_id], pair, seed=number)
        yield episode(number, tag="ours").model_copy(update={"match": match})


def test_an_episode_appears_to_sotopia_once_it_is_judged(store, db):
    one = episode()
    store.add_episode(one)
    assert log_in(db, one.id) is None
    store.add_rating(rating(one))
    assert log_in(db, one.id) == log_document(one, rating(one))
    assert db.exists(":sotopia.database.persistent_profile.AgentProfile:ann")
    assert db.exists(":sotopia.database.persistent_profile.EnvironmentProfile:scenario0")


def test_a_rating_that_came_first_makes_the_log_when_the_episode_comes(store, db):
    store.add_rating(rating(episode()))
    store.add_episode(episode())
    assert log_in(db, episode().id) == log_document(episode(), rating(episode()))


def test_failures_other_judges_and_attributions_stay_out_of_sotopias_records(store, db):
    one, failed = episode(1), episode(2, failure=FAILURE)
    store.add_episodes([one, failed])
    store.add_ratings([rating(one, "first"), rating(one, "a second", offset=1)])
    store.add_attribution(attribution(one))
    store.add_failure("judge", failed.id, FAILURE)
    assert log_in(db, one.id)["models"][0] == "first"
    assert log_in(db, failed.id) is None
    store.add_rating(rating(one, "first", offset=2))
    assert log_in(db, one.id) == log_document(one, rating(one, "first", offset=2))
    assert [r.judge for r in store.ratings(one.id)] == ["a second", "first"]


def test_another_conversation_takes_the_log_with_it(store, db):
    one = episode()
    store.add_episode(one)
    store.add_rating(rating(one))
    store.add_episode(one.model_copy(update={"turns": one.turns[:3]}))
    assert log_in(db, one.id) is None
    store.add_rating(rating(one))
    assert len(log_in(db, one.id)["messages"]) == 4
    store.delete_episodes([one.id])
    assert log_in(db, one.id) is None
    assert [key for key in db.keys("sotopia-rl:*") if one.id in key] == []


def test_a_damaged_episode_is_named_and_can_be_removed(store, db):
    store.add_episodes([episode(1), episode(2)])
    db.set(f"sotopia-rl:episode:{episode(1).id}", '{"id": 3')
    with pytest.raises(DamagedRecordError, match=rf"episode {episode(1).id} cannot be read"):
        list(store.episodes())
    assert store.delete_episodes([episode(1).id]) == 1
    assert list(store.episodes()) == [episode(2)]


def test_a_new_tag_reaches_the_log(store, db):
    store.add_episode(episode())
    store.add_rating(rating(episode()))
    store.add_episode(episode().model_copy(update={"tag": "renamed"}))
    assert log_in(db, episode().id)["tag"] == "renamed"


@needs_sotopia_data
def test_sotopias_own_log_is_taken_up_and_left_as_it_is(server, db):
    golden = json.loads((GOLDEN / "redis_EpisodeLog_sotopia-0.1.4.json").read_text(encoding="utf-8"))
    db.execute_command("JSON.SET", golden["key"], "$", json.dumps(golden["value"]))
    with open_store(server) as store:
        ((one, its_rating),) = store.rated()
        assert one.tag == "sample_mock_0.1.4"
        assert store.original(one.id).document == golden["value"]
        store.add_episode(one)
        store.add_rating(its_rating)
        store.add_rating(rating(one, "another judge"))
        assert store.adopt().episodes == 0
    assert log_in(db, one.id) == golden["value"]


def test_logs_that_cannot_be_read_are_counted_and_stop_nothing(server, db, caplog):
    good = log_document(episode(), rating(episode()))
    for pk, broken in (("x", {"pk": "x"}), ("y", {**good, "pk": "y", "messages": []}), (good["pk"], good)):
        db.execute_command("JSON.SET", EPISODE_LOG + pk, "$", json.dumps(broken))
    with open_store(server) as store:
        assert store.ids() == [good["pk"]]
    assert "1 not an episode of sotopia's; 1 without opening contexts" in caplog.text


@needs_sotopia_data
def test_a_round_trip_through_redis_and_sqlite_changes_nothing(store, db, tmp_path):
    path, again = GOLDEN / "episodes_to_jsonl_sotopia-0.1.4.jsonl", tmp_path / "again.jsonl"
    import_file(path, store, known=profiles())
    store.add_episode(episode(7, failure=FAILURE))
    with open_store(tmp_path / "e.db") as other:
        copy(store, other)
        db.flushall()
        copy(other, store)
        export_file(store, again, layout="sotopia")
        assert list(store.rated()) == list(other.rated())
        assert list(store.episodes()) == list(other.episodes())
    lines = sorted(path.read_text(encoding="utf-8").splitlines())
    assert sorted(again.read_text(encoding="utf-8").splitlines()) == lines


def test_redis_om_url_is_honoured_and_a_password_is_never_shown(server, db, monkeypatch):
    monkeypatch.setenv("REDIS_OM_URL", server)
    with open_store("redis") as store:
        store.add_episode(episode())
    assert db.exists(f"sotopia-rl:episode:{episode().id}")
    monkeypatch.delenv("REDIS_OM_URL")
    with pytest.raises(StoreError, match="set REDIS_OM_URL"):
        open_store("redis://")
    with redis_server(arguments=("--requirepass", "hunter2")) as locked:
        port = locked.rsplit(":", 1)[1]
        open_store(f"redis://:hunter2@127.0.0.1:{port}").close()
        for wrong in (locked, f"redis://:hunter3@127.0.0.1:{port}"):
            with pytest.raises(StoreError, match="password") as caught:
                open_store(wrong)
            assert "hunter" not in str(caught.value)


def test_a_redis_that_cannot_serve_is_one_clear_error(server, db):
    with (
        redis_server(modules=False) as bare,
        pytest.raises(StoreError, match="no JSON and no search module; start Redis 8"),
    ):
        open_store(bare)
    with pytest.raises(StoreError, match="no Redis answers"):
        open_store("redis://127.0.0.1:1")
    with pytest.raises(StoreError, match="database 0 only"):
        open_store(f"{server}/3")
    db.set("sotopia-rl:schema_version", "0")
    with pytest.raises(StoreError, match="schema version 0"):
        open_store(server)


def test_a_redis_out_of_memory_is_one_clear_error_and_keeps_what_it_has(db, store):
    store.add_episode(episode(0))
    db.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(StoreError, match="out of memory"):
            store.add_episode(episode(1))
    finally:
        db.config_set("maxmemory", "0")
    assert store.ids() == [episode(0).id]
    assert list(store.episodes()) == [episode(0)]


@pytest.mark.slow
@needs_sotopia
@needs_sotopia_data
def test_what_we_wrote_comes_back_from_the_real_sotopia(store, server, db, tmp_path):
    episodes = list(real_episodes())
    store.add_episodes([*episodes, episode(99, tag="ours", failure=FAILURE)])
    store.add_ratings(rating(e, judge) for e in episodes for judge in ("scripted/judge", "other"))
    ids = [e.id for e in episodes]
    answer = oracle(server, "read", "ours", tmp_path / "theirs.jsonl", *ids)
    assert answer["found"] == sorted(ids)
    expected = [log_document(e, rating(e)) for e in episodes]
    assert [json.loads(json.dumps(got)) for got in answer["got"]] == expected
    lines = [json.dumps(line_document(e, rating(e))) for e in episodes]
    assert (tmp_path / "theirs.jsonl").read_text(encoding="utf-8").splitlines() == lines
    for name, state in oracle(server, "schemas").items():
        prefix = name.removesuffix("index")
        assert state["schema"] == schema(prefix)
        assert state["hash"] == hashlib.sha1(schema(prefix).encode(), usedforsecurity=False).hexdigest()
    assert [log_in(db, one) for one in ids] == expected


@pytest.mark.slow
@needs_sotopia
@needs_sotopia_data
def test_what_the_real_sotopia_wrote_comes_back_here_whole(server, db, tmp_path):
    lines = (GOLDEN / "episodes_to_jsonl_sotopia-0.1.4.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    given = {"episodes": str(GOLDEN / "episodes_to_jsonl_sotopia-0.1.4.jsonl"), **their_profiles(documents)}
    (tmp_path / "given.json").write_text(json.dumps(given))
    assert oracle(server, "write", tmp_path / "given.json") == "done"
    before = {key: db.execute_command("JSON.GET", key) for key in db.keys(":sotopia.*") if not key.endswith(":hash")}
    with open_store(server) as store:
        assert sorted(store.ids()) == sorted(d["episode_id"] for d in documents)
        for document in documents:
            match = store.episode(document["episode_id"]).match
            assert match.scenario == profiles().scenarios[document["environment_id"]]
            assert match.characters == tuple(profiles().characters[i] for i in document["agent_ids"])
        export_file(store, tmp_path / "ours.jsonl", layout="sotopia")
        found = store.profiles()
        assert found.scenarios == {d["environment_id"]: profiles().scenarios[d["environment_id"]] for d in documents}
        assert len(found.combos) == len(found.relationships) == 1
    assert sorted((tmp_path / "ours.jsonl").read_text(encoding="utf-8").splitlines()) == sorted(lines)
    after = {key: db.execute_command("JSON.GET", key) for key in before}
    assert after == before
    ids = [d["episode_id"] for d in documents]
    oracle(server, "read", "sample_mock_0.1.4", tmp_path / "theirs.jsonl", *ids)
    assert (tmp_path / "theirs.jsonl").read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.slow
def test_the_command_line_and_the_papers_script_move_episodes_through_a_real_redis(server, db, tmp_path):
    assert not db.keys()
    with open_store(tmp_path / "ours.db") as ours:
        ours.add_episodes([episode(1, tag="t"), episode(2, tag="t"), episode(3, tag="t", failure=FAILURE)])
        ours.add_ratings(rating(episode(n, tag="t")) for n in (1, 2))

    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "REDIS_OM_URL": server},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    episodes = ("-m", "sotopia_rl.cli", "episodes")
    run(*episodes, "export", server, "--store", tmp_path / "ours.db", "--tag", "t")
    listed = run(*episodes, "list", "--store", server, "--tag", "t")
    assert episode(1).id[-6:] in listed
    script = Path(__file__).parents[1] / "scripts/data_process/serialize.py"
    run(script, "--tag", "t", "--output_file", tmp_path / "by_tag.jsonl")
    run(script, "--pk", episode(2, tag="t").id, "--output_file", tmp_path / "by_key.jsonl")
    by_tag, by_key = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("by_tag", "by_key"))
    assert sorted(json.loads(line)["episode_id"] for line in by_tag) == [episode(n, tag="t").id for n in (1, 2)]
    assert by_key == [line for line in by_tag if episode(2, tag="t").id in line]
    run(*episodes, "import", server, "--store", tmp_path / "back.db")
    with open_store(tmp_path / "back.db") as back, open_store(tmp_path / "ours.db") as ours:
        assert list(back.episodes()) == list(ours.episodes())
        assert list(back.ratings()) == list(ours.ratings())


def their_profiles(documents):
    """Keyword arguments for sotopia's own models."""
    rows = {name: FOLDER / f"{name}.jsonl" for name in ("agent_profiles", "environment_profiles")}
    found = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in rows.items()}
    agents = {i for d in documents for i in d["agent_ids"]}
    environments = {d["environment_id"] for d in documents}
    characters, scenarios = profiles().characters, profiles().scenarios
    return {
        "agents": [
            {"pk": a["agent_id"], **{k: v for k, v in a.items() if k != "agent_id"}}
            | {"moral_values": characters[a["agent_id"]].moral_values}
            | {"schwartz_personal_values": characters[a["agent_id"]].schwartz_personal_values}
            for a in found["agent_profiles"]
            if a["agent_id"] in agents
        ],
        "environments": [
            {"pk": e["env_id"], **{k: v for k, v in e.items() if k not in ("env_id", "agent_constraint")}}
            | {"relationship": int(e["relationship"]), "age_constraint": scenarios[e["env_id"]].age_constraint}
            | {"occupation_constraint": scenarios[e["env_id"]].occupation_constraint}
            for e in found["environment_profiles"]
            if e["env_id"] in environments
        ],
        "combos": [{"pk": "c", "env_id": documents[0]["environment_id"], "agent_ids": documents[0]["agent_ids"]}],
        "relationships": [{"pk": "r", "agent_1_id": "x", "agent_2_id": "y", "relationship": 2}],
    }
