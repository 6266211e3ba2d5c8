from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sotopia_rl.episode import SCHEMA_VERSION
from sotopia_rl.errors import DataError, StoreError
from sotopia_rl.store import EpisodeQuery, JsonlStore, copy, export_file, import_file, open_store
from store_samples import FAILURE, attribution, episode, rating

TESTS = Path(__file__).parent


@pytest.fixture
def source(tmp_path):
    """Two judges, one failed episode, one unjudged, attributions, a failure of a stage."""
    with open_store(tmp_path / "source.db") as store:
        store.add_episodes(episode(n, tag="ab"[n % 2], failure=FAILURE if n == 4 else None) for n in range(6))
        for n in range(4):
            one = episode(n, tag="ab"[n % 2])
            store.add_rating(rating(one))
            store.add_attributions([attribution(one), attribution(one, "knowledge")])
        store.add_rating(rating(episode(3, tag="b"), "j2"))
        store.add_failure("judge", episode(5, tag="b").id, FAILURE)
        yield store


def contents(store):
    return (
        list(store.episodes()),
        list(store.ratings()),
        list(store.attributions()),
        list(store.failures()),
        [store.original(i) for i in store.ids()],
    )


@pytest.mark.parametrize("name", ["target.db", "target.jsonl"])
def test_a_copy_holds_everything_and_copying_again_changes_nothing(source, tmp_path, name):
    with open_store(tmp_path / name) as target:
        report = copy(source, target)
        assert (report.episodes, report.ratings, report.attributions, report.failures) == (6, 5, 8, 1)
        assert contents(target) == contents(source)
        copy(source, target)
        assert contents(target) == contents(source)


def test_our_own_file_holds_everything_and_is_the_same_bytes_again(source, tmp_path):
    path, again = tmp_path / "all.jsonl", tmp_path / "again.jsonl"
    report = export_file(source, path)
    assert str(report) == "6 episodes, 5 ratings, 8 attributions, 1 failures"
    with open_store(tmp_path / "target.sqlite") as target:
        import_file(path, target)
        assert contents(target) == contents(source)
        export_file(target, again)
    assert again.read_bytes() == path.read_bytes()
    with open_store(path) as in_place:
        assert contents(in_place) == contents(source)


def test_a_query_chooses_what_is_copied_with_what_is_said_of_it(source, tmp_path):
    with open_store(tmp_path / "t.db") as target:
        report = copy(source, target, EpisodeQuery(tag="a"))
        assert (report.episodes, report.ratings, report.failures) == (3, 2, 0)
        assert target.tags() == {"a": 3}


def test_failed_judgements_and_attributions_go_with_a_choice_of_episodes(source, tmp_path):
    for number, tag in ((0, "a"), (1, "b")):
        source.add_failure("judge", f"{episode(number, tag=tag).id}/custom/j@http://localhost", FAILURE)
    with open_store(tmp_path / "t.db") as target:
        copy(source, target, EpisodeQuery(tag="a"))
        assert [item.split("/")[0] for _, item, _ in target.failures()] == [episode(0, tag="a").id]


def test_sotopias_file_holds_judged_episodes_and_the_rest_is_counted(source, tmp_path):
    path = tmp_path / "s.jsonl"
    report = export_file(source, path, layout="sotopia")
    assert report.episodes == 3
    assert dict(report.left_out) == {
        "not completed (agent_failed)": 1,
        "not judged": 1,
        "rated by several judges, and none was chosen": 1,
        "attributions": 6,
    }
    assert "Left out: 6 attributions; 1 not completed (agent_failed)" in str(report)
    chosen = export_file(source, path, layout="sotopia", judge="j2")
    assert (chosen.episodes, chosen.left_out["not judged"], chosen.left_out["ratings of other judges"]) == (1, 4, 1)


def test_sotopias_file_comes_back_and_goes_out_the_same(source, tmp_path):
    path, again = tmp_path / "s.jsonl", tmp_path / "again.jsonl"
    export_file(source, path, EpisodeQuery(tag="a"), layout="sotopia")
    with open_store(tmp_path / "t.db") as target:
        report = import_file(path, target)
        assert (report.episodes, report.ratings) == (2, 2)
        assert report.notes["characters known only from the opening contexts"] == 2
        export_file(target, again, layout="sotopia")
        with open_store(tmp_path / "copied.jsonl") as copied:
            copy(target, copied)
            export_file(copied, tmp_path / "third.jsonl", layout="sotopia")
    assert again.read_bytes() == path.read_bytes() == (tmp_path / "third.jsonl").read_bytes()


def test_lines_of_sotopias_that_we_cannot_represent_are_counted(source, tmp_path):
    path = tmp_path / "s.jsonl"
    export_file(source, path, EpisodeQuery(tag="a"), layout="sotopia")
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    first["raw_messages"][0][3][2] = 'said: "at the same time"'
    path.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    with open_store(tmp_path / "t.db") as target:
        report = import_file(path, target)
        assert dict(report.left_out) == {"both agents act in one turn": 1}
        assert target.ids() == [second["episode_id"]]


def test_a_half_written_last_line_is_refused_or_skipped(source, tmp_path, caplog):
    path = tmp_path / "all.jsonl"
    export_file(source, path)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    lines = data.count(b"\n")
    with open_store(tmp_path / "t.db") as target:
        with pytest.raises(DataError, match=rf"all\.jsonl:{lines}: the last line is half-written"):
            import_file(path, target)
        import_file(path, target, torn="skip")
        assert target.count() == 6
    assert f"all.jsonl:{lines}: the last line is half-written" in caplog.text


def test_a_torn_file_is_mended_when_it_is_written_on(tmp_path):
    path = tmp_path / "e.jsonl"
    with open_store(path) as store:
        store.add_episodes([episode(1), episode(2)])
    path.write_bytes(path.read_bytes()[:-50])
    with open_store(path) as store:
        store.add_episodes([episode(2), episode(3)])
    with open_store(path) as store:
        assert set(store.ids()) == {episode(n).id for n in (1, 2, 3)}
    path.write_bytes(path.read_bytes()[:-1])  # whole but for the line end
    with open_store(path) as store:
        store.add_episode(episode(4))
    with open_store(path) as store:
        assert store.count() == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "episode", "record": {', r"e\.jsonl:2: not JSON \(Expecting [^:]* quotes\); mend"),
        ("[1]", r"e\.jsonl:2: expected a JSON object, found list"),
        ('{"kind": "guess", "record": {}}', r"e\.jsonl:2: kind 'guess'; expected one of episode"),
        (
            '{"kind": "rating", "record": {"judge": 3}}',
            r"e\.jsonl:2: not a valid rating \(episode_id: Field required\)",
        ),
        ('{"kind": "header", "format": "x"}', r"e\.jsonl:2: a header of 'x'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "e.jsonl"
    JsonlStore(path).close()
    with JsonlStore(path) as store:
        store.add_episode(episode())
    header = path.read_text().splitlines()[0]
    path.write_text(f"{header}\n{line}\n")
    with pytest.raises(DataError, match=message):
        open_store(path)


def test_files_of_another_version_or_another_kind_are_refused(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps({"kind": "header", "format": "sotopia-rl", "schema_version": SCHEMA_VERSION + 1}) + "\n")
    with pytest.raises(StoreError, match=rf"e\.jsonl:1: written with schema version {SCHEMA_VERSION + 1}"):
        open_store(path)
    path.write_text('{"input": "x"}\n')
    with pytest.raises(DataError, match="neither a sotopia-rl file nor"):
        import_file(path, open_store(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="no sotopia-rl header"):
        open_store(path)
    path.write_text("")
    with pytest.raises(DataError, match="empty"):
        import_file(path, open_store(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        import_file(tmp_path / "missing.jsonl", open_store(tmp_path / "none.jsonl"))


def test_an_export_into_what_is_no_folder_is_one_clear_error(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"e\.jsonl: cannot be written \(File exists\); free some space or give anoth"):
        export_file(source, tmp_path / "file" / "e.jsonl")


@pytest.mark.parametrize("layout", ["sotopia-rl", "sotopia"])
def test_an_export_that_finds_the_disk_full_keeps_the_older_file(tmp_path, layout):
    path = tmp_path / "e.jsonl"
    path.write_text("older")
    code = (
        "import resource, sys; from store_samples import *; from sotopia_rl.store import *\n"
        "from sotopia_rl.errors import StoreError\n"
        "s = open_store(sys.argv[1] + '.db')\n"
        "for n in range(60): s.add_episode(episode(n)); s.add_rating(rating(episode(n)))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: export_file(s, __import__('pathlib').Path(sys.argv[1]), layout=sys.argv[2])\n"
        "except StoreError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), layout], env=env, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert "cannot be written (File too large)" in done.stdout
    assert path.read_text() == "older"
    assert [p.name for p in tmp_path.glob("*.part")] == []


def test_a_jsonl_store_on_a_full_disk_keeps_whole_lines(tmp_path):
    path = tmp_path / "e.jsonl"
    code = (
        "import resource, sys; from store_samples import *; from sotopia_rl.store import *\n"
        "from sotopia_rl.errors import StoreError\n"
        "s = open_store(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: s.add_episodes(episode(n) for n in range(100))\n"
        "except StoreError as error: print(s.count())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, check=True)
    with open_store(path) as store:
        assert 0 < store.count() == int(done.stdout)
        assert list(store.episodes())
