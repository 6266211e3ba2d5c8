from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from damage import cut_short
from sotopia_rl.episode import SCHEMA_VERSION
from sotopia_rl.errors import DamagedRecordError, StoreError
from sotopia_rl.store import SQLiteStore, open_store
from store_samples import FAILURE, episode, rating

TESTS = Path(__file__).parent


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "run" / "episodes.db") as opened:
        yield opened


def child(code: str, *args: str) -> subprocess.Popen[str]:
    """A process of its own that can import the samples."""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_several_processes_may_make_and_fill_the_same_store(tmp_path):
    path = tmp_path / "shared.db"
    code = (
        "import sys; from store_samples import *; from sotopia_rl.store import open_store\n"
        "with open_store(sys.argv[1]) as s:\n"
        "    for n in range(40): s.add_episode(episode(n, tag=sys.argv[2]))\n"
    )
    workers = [child(code, str(path), tag) for tag in "abcd"]
    for worker in workers:
        assert worker.communicate(timeout=60)[1] == ""
    with open_store(path) as store:
        assert store.tags() == dict.fromkeys("abcd", 40)


def test_several_threads_may_share_a_store(store):
    def write(tag):
        for n in range(20):
            store.add_episode(episode(n, tag=tag))

    threads = [threading.Thread(target=write, args=(tag,)) for tag in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.tags() == dict.fromkeys("abcd", 20)


def test_a_writer_killed_at_any_moment_leaves_whole_records_and_can_go_on(tmp_path):
    path = tmp_path / "killed.db"
    code = (
        "import sys, itertools; from store_samples import *; from sotopia_rl.store import open_store\n"
        "s = open_store(sys.argv[1])\n"
        "for n in itertools.count():\n"
        "    s.add_episode(episode(n)); s.add_rating(rating(episode(n))); print(n, flush=True)\n"
    )
    reported = -1
    for _ in range(3):
        worker = child(code, str(path))
        for _ in range(25):
            reported = max(reported, int(worker.stdout.readline()))
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        with open_store(path) as store:
            expected = {episode(n).id for n in range(reported + 1)}
            assert expected <= set(store.ids())
            assert expected <= store.rated_ids("scripted/judge")
            list(store.episodes())
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path):
    path = tmp_path / "full.db"
    code = (
        "import resource, sys; from store_samples import *; from sotopia_rl.store import open_store\n"
        "from sotopia_rl.errors import StoreError\n"
        "s = open_store(sys.argv[1]); s.add_episode(episode(0))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "for n in range(1, 1000):\n"
        "    try: s.add_episode(episode(n))\n"
        "    except StoreError as error:\n"
        "        print(n); print(error); s.close(); break\n"
    )
    out, err = child(code, str(path)).communicate(timeout=60)
    assert err == ""
    failed_at, message = out.split("\n", 1)
    assert "full" in message
    assert "Free some space and run again" in message
    with open_store(path) as store:
        assert set(store.ids()) == {episode(n).id for n in range(int(failed_at))}
        store.add_episode(episode(5000))


def test_a_store_of_another_version_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "old.db"
    open_store(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(StoreError, match=rf"old\.db: written with schema version {SCHEMA_VERSION + 1}.*export"):
        open_store(path)


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path):
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("hello " * 500)
    db = sqlite3.connect(other)
    db.execute("CREATE TABLE theirs (x)")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match="not a database"):
        open_store(text)
    with pytest.raises(StoreError, match="not an episode store"):
        open_store(other)
    assert text.read_text() == "hello " * 500


def test_a_torn_store_is_one_clear_error(tmp_path):
    path = tmp_path / "torn.db"
    with open_store(path) as store:
        store.add_episodes(episode(n) for n in range(100))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="damaged"), open_store(path) as store:
        list(store.episodes())


def test_a_truncated_record_is_named(tmp_path):
    path = tmp_path / "e.db"
    with open_store(path) as store:
        store.add_episode(episode())
    cut_short(path, episode().id)
    with open_store(path) as store, pytest.raises(DamagedRecordError, match=rf"episode {episode().id} cannot be read"):
        list(store.episodes())


def test_what_is_damaged_beside_an_episode_goes_with_it(store):
    store.add_episode(episode())
    store.add_rating(rating(episode()))
    store.add_failure("judge", f"{episode().id}/j", FAILURE)
    cut_short(store.path, episode().id, "ratings", "episode_id")
    cut_short(store.path, f"{episode().id}/j", "failures", "item_id", length=5)
    assert store.delete_episodes([episode().id]) == 1
    assert [*store.ratings(), *store.failures()] == []


def test_a_place_that_cannot_hold_a_store_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a folder, not a store"):
        SQLiteStore(tmp_path)
    with pytest.raises(StoreError, match="folder cannot be made"):
        open_store(tmp_path / "file" / "e.db")
    with pytest.raises(StoreError, match="no such store"):
        open_store(tmp_path / "missing.db", create=False)
    with pytest.raises(StoreError, match="not the name of a store"):
        open_store(tmp_path / "episodes.csv")


def without_privileges(command):
    """The command as somebody whom file permissions bind; root has to give that up first."""
    if os.geteuid():
        return command
    if not shutil.which("setpriv"):
        pytest.skip("root may write anywhere, and there is no setpriv to give that up")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]


def test_a_store_that_may_not_be_written_is_one_clear_error_and_can_be_read(tmp_path):
    path = tmp_path / "e.db"
    with open_store(path) as store:
        store.add_episode(episode())
    path.chmod(0o400)
    code = (
        "import sys; from store_samples import *; from sotopia_rl.store import open_store\n"
        "from sotopia_rl.errors import StoreError\n"
        "with open_store(sys.argv[1]) as s:\n"
        "    print(s.count())\n"
        "    try: s.add_episode(episode(2))\n"
        "    except StoreError as error: print(error)\n"
    )
    command = without_privileges([sys.executable, "-c", code, str(path)])
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    count, message = done.stdout.splitlines()
    assert count == "1"
    assert message == f"{path}: not writable; check the permissions of the file and its folder"


def test_another_process_in_a_long_transaction_is_waited_for(store):
    other = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    def release():
        time.sleep(0.3)
        other.execute("COMMIT")

    thread = threading.Thread(target=release)
    thread.start()
    store.add_episode(episode())
    thread.join()
    other.close()
    assert store.count() == 1
