"""Uploading results: the hub's own client against a local stand-in, and what is left when it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model_hub import COMMIT, ModelHub, serving
from sotopia_rl.errors import TrainingError
from sotopia_rl.train.config import SFTSettings
from sotopia_rl.train.folder import RunFolder
from sotopia_rl.train.publish import publish

SETTINGS = SFTSettings(push_to_hub="me/negotiator")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    result = tmp_path / "adapter"
    result.mkdir()
    (result / "README.md").write_text("---\nlibrary_name: peft\n---\n# A card\n")
    (result / "adapter_model.safetensors").write_bytes(b"w" * 300)
    return RunFolder(tmp_path)


def test_a_result_is_uploaded_once_as_it_stands(run: RunFolder) -> None:
    with serving(ModelHub()) as hub:
        publish(run, run.path / "adapter", SETTINGS, endpoint=hub.endpoint)
        publish(run, run.path / "adapter", SETTINGS, endpoint=hub.endpoint)
    assert hub.commits == 1
    assert hub.files["me/negotiator/adapter_model.safetensors"] == b"w" * 300
    assert set(hub.files) == {"me/negotiator/README.md", "me/negotiator/adapter_model.safetensors"}
    (made,) = hub.created  # once, and not for everybody to see
    assert (made["organization"], made["name"]) == ("me", "negotiator")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert json.loads((run.path / "published.json").read_text()) == {"repository": "me/negotiator", "commit": COMMIT}


def test_another_repository_gets_it_too(run: RunFolder) -> None:
    with serving(ModelHub()) as hub:
        publish(run, run.path / "adapter", SETTINGS, endpoint=hub.endpoint)
        other = SETTINGS.model_copy(update={"push_to_hub": "me/other"})
        publish(run, run.path / "adapter", other, endpoint=hub.endpoint)
    assert hub.commits == 2


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (("/api/repos/create", 403, "You don't have the rights to create a model"), "403"),
        (("/commit/main", 413, "Payload too large"), "413"),
        (("/api/validate-yaml", 400, "bad card"), "README"),
    ],
)
def test_a_refused_upload_says_what_is_safe_and_can_be_tried_again(
    run: RunFolder, refusal: tuple[str, int, str], words: str
) -> None:
    with serving(ModelHub(refusal=refusal)) as hub:
        with pytest.raises(
            TrainingError, match=rf"adapter is complete and saved.*not uploaded to me/negotiator.*{words}"
        ):
            publish(run, run.path / "adapter", SETTINGS, endpoint=hub.endpoint)
        assert not (run.path / "published.json").exists()
        hub.refusal = None
        publish(run, run.path / "adapter", SETTINGS, endpoint=hub.endpoint)
    assert hub.commits == 1


def test_a_hub_that_is_not_there_is_named(run: RunFolder) -> None:
    with pytest.raises(TrainingError, match=r"not uploaded to me/negotiator at http://127\.0\.0\.1:9 "):
        publish(run, run.path / "adapter", SETTINGS, endpoint="http://127.0.0.1:9")


@pytest.mark.slow
def test_the_command_ends_with_1_after_everything_is_saved_and_uploads_at_the_next_call(
    rows: Path, base: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sotopia_rl.cli", "sft", "--rows", rows, "--base", base, "--output", tmp_path]
    command += ["--max-steps", "1", "--max-length", "512", "--held-out-share", "0", "--push-to-hub", "me/negotiator"]

    def call(endpoint: str, token: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(map(str, command), capture_output=True, text=True, env=environment, check=False)

    with serving(ModelHub(token="right")) as hub:
        refused = call(hub.endpoint, "wrong")
        assert refused.returncode == 1
        assert "is complete and saved, but it was not uploaded to me/negotiator" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert "wrong" not in refused.stderr  # no token in a message
        assert (tmp_path / "finished.json").is_file()
        made = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
        accepted = call(hub.endpoint, "right")
    assert accepted.returncode == 0, accepted.stderr
    assert hub.files["me/negotiator/adapter_model.safetensors"] == made
    assert b"sotopia-rl sft" in hub.files["me/negotiator/README.md"]
