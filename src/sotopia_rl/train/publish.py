"""Uploading a finished result to the Hugging Face hub, the one that `HF_ENDPOINT` names.

It comes last, when everything is saved: an upload that fails loses nothing, and the same command tries it again.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sotopia_rl.errors import MissingExtraError, TrainingError
from sotopia_rl.train.config import TrainerSettings
from sotopia_rl.train.folder import RunFolder, read_json, write_json


def check_publishing(settings: TrainerSettings) -> None:
    """Raises MissingExtraError where the result is to be uploaded and the hub's client is not installed."""
    if settings.push_to_hub is not None and find_spec("huggingface_hub") is None:
        raise MissingExtraError("huggingface_hub", "hub")


def publish(run: RunFolder, result: Path, settings: TrainerSettings) -> None:
    """Upload the folder `result` where the settings say so and it was not done before.

    A repository that is not there yet is made, private. `HF_TOKEN` or a login gives the right to write.

    Raises:
        TrainingError: The hub cannot be reached or refuses; the result is safe on the disk.
    """
    repository, note = settings.push_to_hub, run.path / "published.json"
    if repository is None or (note.is_file() and read_json(note)["repository"] == repository):
        return
    from huggingface_hub import HfApi, errors  # noqa: PLC0415 - the package is optional

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=result, commit_message=f"{run.path.name} trained")
    except (errors.HfHubHTTPError, errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TrainingError(
            f"{result} is complete and saved, but it was not uploaded to {repository} at {api.endpoint} ({reason}); "
            "the same command tries the upload again (HF_TOKEN gives the right to write)"
        ) from error
    write_json(note, {"repository": repository, "commit": commit.oid})
