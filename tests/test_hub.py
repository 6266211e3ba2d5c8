import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import call
from hub_server import COMMIT, Hub, serving
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.hub import pull

MIB = 2**20
EPISODES = b'{"episode_id": "1"}\n' * 2000
LARGE = EPISODES * 350  # more than the 10 MiB that the hub's client writes at a time


def sotopia_pi(**options: object) -> Hub:
    files = {"sotopia_pi_episodes.jsonl": EPISODES, "README.md": b"# readme", "dump.rdb": b"0" * 100}
    return Hub("cmu-lti/sotopia-pi", files, **options)


def test_only_the_files_of_the_data_set_are_fetched(tmp_path):
    with serving(sotopia_pi()) as hub:
        pulled = pull("sotopia-pi", tmp_path, endpoint=hub.endpoint)
    assert [path.name for path in pulled.files] == ["README.md", "sotopia_pi_episodes.jsonl"]
    assert pulled.files[1].read_bytes() == EPISODES
    assert (pulled.commit, pulled.data_set.licence) == (COMMIT, "CC-BY-SA-4.0")
    assert not (tmp_path / "dump.rdb").exists()


def test_a_second_pull_downloads_nothing(tmp_path):
    with serving(sotopia_pi()) as hub:
        pull("sotopia-pi", tmp_path, endpoint=hub.endpoint)
        before = len(hub.downloads)
        again = pull("cmu-lti/sotopia-pi", tmp_path, endpoint=hub.endpoint)
        assert len(hub.downloads) == before == 2
    assert again.files[1].read_bytes() == EPISODES


def test_other_files_of_the_data_set_can_be_named(tmp_path):
    with serving(sotopia_pi()) as hub:
        pulled = pull("sotopia-pi", tmp_path, files=["*.rdb"], endpoint=hub.endpoint)
        assert [path.name for path in pulled.files] == ["dump.rdb"]
        with pytest.raises(DataError, match=r"no file matches '\*\.csv'; there are README\.md, dump\.rdb"):
            pull("sotopia-pi", tmp_path, files=["*.csv"], endpoint=hub.endpoint)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(tmp_path):
    hub = Hub("cmu-lti/sotopia-pi", {"sotopia_pi_episodes.jsonl": LARGE}, cut_at=11 * MIB, cuts=1)
    with serving(hub):
        pulled = pull("sotopia-pi", tmp_path, endpoint=hub.endpoint)
    assert [wanted for _, wanted in hub.downloads] == [None, f"bytes={10 * MIB}-"]
    assert pulled.files[0].read_bytes() == LARGE


PULL = "import sys, pathlib; from sotopia_rl.hub import pull; pull('sotopia-pi', pathlib.Path(sys.argv[1]))"


def wait_for_bytes(target: Path, size: int) -> None:
    for _ in range(3000):
        if any(path.stat().st_size >= size for path in target.rglob("*.incomplete")):
            return
        time.sleep(0.02)
    pytest.fail("the download never got that far")


def test_a_killed_pull_leaves_no_half_file_and_the_next_one_completes_it(tmp_path):
    files = {"README.md": b"# readme", "sotopia_pi_episodes.jsonl": LARGE}
    hub = Hub("cmu-lti/sotopia-pi", files, cut_at=11 * MIB, cuts=1, stall=True)
    with serving(hub):
        environment = {"HF_ENDPOINT": hub.endpoint, "HOME": str(tmp_path), "PATH": ""}
        target = tmp_path / "data"
        process = subprocess.Popen([sys.executable, "-c", PULL, str(target)], env=environment)
        wait_for_bytes(target, 10 * MIB)
        process.kill()
        process.wait()
        hub.ended.set()
        assert not (target / "sotopia_pi_episodes.jsonl").exists()
        pull("sotopia-pi", target, endpoint=hub.endpoint)
    assert [name for name, _ in hub.downloads] == ["README.md", *["sotopia_pi_episodes.jsonl"] * 2]
    assert (target / "sotopia_pi_episodes.jsonl").read_bytes() == LARGE


def test_the_endpoint_comes_from_the_environment(tmp_path):
    with serving(sotopia_pi()) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HOME": str(tmp_path), "PATH": ""}
        subprocess.run([sys.executable, "-c", PULL, str(tmp_path / "data")], env=environment, check=True)
    assert (tmp_path / "data" / "sotopia_pi_episodes.jsonl").read_bytes() == EPISODES


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "no such data set at .*HF_TOKEN"),
        ((401, "RepoNotFound"), "no such data set at .*HF_TOKEN"),
        ((403, "GatedRepo"), "gated; accept its terms"),
        ((503, ""), "answered HTTP 503; run the same command again"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(tmp_path, refusal, message):
    with serving(sotopia_pi(refusal=refusal)) as hub, pytest.raises(DataError, match=message) as caught:
        pull("sotopia-pi", tmp_path, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)


def test_an_unknown_revision_is_named(tmp_path):
    with serving(sotopia_pi()) as hub, pytest.raises(DataError, match="no revision 'v9'"):
        pull("sotopia-pi", tmp_path, revision="v9", endpoint=hub.endpoint)


def test_an_unreachable_hub_is_named(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(DataError, match=f"cannot reach {endpoint} .*HF_ENDPOINT"):
        pull("sotopia-pi", tmp_path, endpoint=endpoint)


def test_an_unknown_data_set_is_refused_before_any_request(tmp_path):
    with pytest.raises(ConfigError, match="there are sotopia-pi, sotopia, reward-annotation"):
        pull("sotopia-phi", tmp_path, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("announced", "message"), [(EPISODES + b"{}", "but the hub has 40002"), (EPISODES[::-1], "its checksum is not")]
)
def test_a_file_that_is_not_what_the_hub_announced_is_refused(tmp_path, announced, message):
    hub = sotopia_pi(announced={"sotopia_pi_episodes.jsonl": announced})
    with serving(hub), pytest.raises(DataError, match=message):
        pull("sotopia-pi", tmp_path, endpoint=hub.endpoint)


def test_a_target_that_is_a_file_is_refused(tmp_path):
    target: Path = tmp_path / "data"
    target.write_text("here already")
    with serving(sotopia_pi()) as hub, pytest.raises(DataError, match="cannot be written"):
        pull("sotopia-pi", target, endpoint=hub.endpoint)
    assert target.read_text() == "here already"


def sotopia_rl(*arguments: str, endpoint: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": endpoint, "HOME": str(folder), "PATH": "", "COLUMNS": "80"}
    command = [sys.executable, "-m", "sotopia_rl.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_the_command_prints_the_files_and_the_licence(tmp_path):
    with serving(sotopia_pi()) as hub:
        done = sotopia_rl("data", "pull", "sotopia-pi", endpoint=hub.endpoint, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["data/sotopia-pi/README.md", "data/sotopia-pi/sotopia_pi_episodes.jsonl"]
    assert lines[2].startswith(f"cmu-lti/sotopia-pi at {COMMIT[:12]}: ")
    assert lines[2].endswith("Licence: CC-BY-SA-4.0.")
    assert (tmp_path / lines[1]).read_bytes() == EPISODES


def test_the_command_fails_in_one_line(tmp_path, capsys, monkeypatch):
    with serving(sotopia_pi(refusal=(503, ""))) as hub:
        failed = sotopia_rl("data", "pull", "sotopia-pi", endpoint=hub.endpoint, folder=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.splitlines()[-1].startswith("sotopia-rl: cmu-lti/sotopia-pi: ")
    monkeypatch.chdir(tmp_path)
    assert call("data", "pull", "sotopia-phi") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
