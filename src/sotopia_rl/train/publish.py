"""What comes after the last step: the result's card, the mark that the run is over, the upload to the hub.

The upload, to the hub that `HF_ENDPOINT` names, comes last, when everything is saved: one that fails loses nothing, and
the same command tries it again. No torch here: a command that finds its run finished has its answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sotopia_rl.errors import MissingExtraError, TrainingError
from sotopia_rl.train.config import TrainerSettings
from sotopia_rl.train.folder import RunFolder, claim, fingerprints, read_json, write_json
from sotopia_rl.train.processes import is_main


def check_publishing(settings: TrainerSettings) -> None:
    """Raises MissingExtraError where the result is to be uploaded and the hub's client is not installed."""
    if settings.push_to_hub is not None and find_spec("huggingface_hub") is None:
        raise MissingExtraError("huggingface_hub", "hub")


def conclude(
    run: RunFolder, result: Path, settings: TrainerSettings, paths: Mapping[str, Path | None], facts: Mapping[str, Any]
) -> None:
    """Write the card into `result`, end the run with its `facts`, upload the result where that is asked for.

    Args:
        paths: What the run read, by the names of its claim.

    Raises:
        TrainingError: As `publish`.
    """
    from sotopia_rl.train.card import write_card  # noqa: PLC0415 - scipy: a second that a finished run need not wait

    read = {name: path for name, path in paths.items() if path is not None}
    if is_main():
        write_card(result, run, read, facts)
    run.finish(facts)
    publish(run, result, settings)


def finished_result(run: RunFolder, settings: TrainerSettings) -> Path | None:
    """The result of a run that is over, uploaded where that is still to be done; None where there is training to do.

    Raises:
        TrainingError: As `publish`.
    """
    if not run.finished:
        return None
    result = run.path / str(read_json(run.finished_file)["result"])
    publish(run, result, settings)
    return result


def finished_before(stage: str, settings: TrainerSettings, out: Path, **paths: Path) -> Path | None:
    """What a training function would return for a run that is over, without importing torch; None for any other.

    Args:
        out: Run folder; it is claimed where it holds a finished run.
        paths: What the run reads, by the names of its claim, the template apart.

    Raises:
        ConfigError: The folder holds a run with other settings.
        DataError: There is nothing at one of `paths`.
        TrainingError: As `publish`.
    """
    if not RunFolder(out).finished:
        return None
    inputs = fingerprints(**paths, template=getattr(settings, "template_path", None))
    return finished_result(claim(out, stage, settings, inputs, resume=True), settings)


def publish(run: RunFolder, result: Path, settings: TrainerSettings, *, endpoint: str | None = None) -> None:
    """Upload the folder `result` where the settings say so and it was not done before.

    A repository that is not there yet is made, private. `HF_TOKEN` or a login gives the right to write.

    Args:
        endpoint: Of the hub; `HF_ENDPOINT`, or the public hub, by default.

    Raises:
        TrainingError: The hub cannot be reached or refuses; the result is safe on the disk.
    """
    repository, note = settings.push_to_hub, run.path / "published.json"
    if repository is None or not is_main() or (note.is_file() and read_json(note)["repository"] == repository):
        return
    from huggingface_hub import HfApi, errors  # noqa: PLC0415 - the package is optional

    api = HfApi(endpoint=endpoint)
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
