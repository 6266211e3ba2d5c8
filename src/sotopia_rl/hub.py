"""Published data sets, fetched from the Hugging Face hub into a folder when somebody asks for them.

None of this data is part of the package, and each data set has its own licence. The hub is the one that
`HF_ENDPOINT` names; `HF_TOKEN` opens gated data sets. All files come from one commit, a connection
that breaks is taken up where it stopped, and what arrived is compared with the hub's size and checksum. A file
appears under its name only when it is whole; after a killed pull the next one fetches what is missing.

Importing this module without huggingface_hub raises `MissingExtraError`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sotopia_rl.errors import ConfigError, DataError, MissingExtraError

try:
    from huggingface_hub import HfApi, errors, hf_hub_download
except ImportError as error:
    raise MissingExtraError("huggingface_hub", "hub") from error


@dataclass(frozen=True)
class DataSet:
    """A data set on the hub, and which of its files are worth fetching."""

    repo_id: str
    files: tuple[str, ...]
    """Glob patterns."""
    licence: str
    about: str


DATA_SETS = {
    "sotopia-pi": DataSet(
        "cmu-lti/sotopia-pi",
        ("sotopia_pi_episodes.jsonl", "README.md"),
        "CC-BY-SA-4.0",
        "the training episodes of SOTOPIA-pi (arXiv 2403.08715), which Sotopia-RL annotates; 71 MB",
    ),
    "sotopia": DataSet(
        "cmu-lti/sotopia",
        ("sotopia_episodes.jsonl", "README.md"),
        "CC-BY-SA-4.0",
        "the episodes of SOTOPIA (arXiv 2310.11667), with scores; 172 MB",
    ),
    "reward-annotation": DataSet(
        "ulab-ai/sotopia-rl-reward-annotation",
        ("*",),
        "Apache-2.0",
        "the utterance-level reward annotations of Sotopia-RL (arXiv 2508.03905)",
    ),
}
"""By the name under which `sotopia-rl data pull` knows them."""


@dataclass(frozen=True)
class Pulled:
    """What a pull left in the target folder."""

    data_set: DataSet
    commit: str
    files: tuple[Path, ...]


def data_set(name: str) -> DataSet:
    """A known data set, by its short name or by its name on the hub.

    Raises:
        ConfigError: It is neither.
    """
    by_repo = {known.repo_id: known for known in DATA_SETS.values()}
    found = DATA_SETS.get(name) or by_repo.get(name)
    if found is None:
        raise ConfigError(f"no data set is called {name!r}; there are {', '.join(DATA_SETS)}")
    return found


def pull(
    name: str,
    target: Path,
    *,
    files: Sequence[str] | None = None,
    revision: str = "main",
    endpoint: str | None = None,
) -> Pulled:
    """Fetch a data set's files into `target`; what is already there and unchanged is left alone.

    Args:
        files: Glob patterns instead of the data set's own.
        revision: Branch, tag or commit.
        endpoint: Of the hub; `HF_ENDPOINT`, or the public hub, by default.

    Raises:
        ConfigError: The data set is unknown.
        DataError: The hub cannot be reached or refuses, has no such file or revision, or what arrived is
            not what it announced. Files that are complete stay; the next call goes on from there.
    """
    wanted = data_set(name)
    api = HfApi(endpoint=endpoint)
    with _explained(wanted.repo_id, revision, api.endpoint):
        info = api.dataset_info(wanted.repo_id, revision=revision, files_metadata=True)
        commit = info.sha
        if commit is None:
            raise DataError(f"{wanted.repo_id}: {api.endpoint} names no commit for {revision!r}; is it a hub?")
        listed = {entry.rfilename: entry for entry in info.siblings or ()}
        chosen = _choose(listed, wanted.files if files is None else files, wanted.repo_id)
        paths = []
        for file_name in chosen:
            hf_hub_download(
                wanted.repo_id, file_name, repo_type="dataset", revision=commit, local_dir=target, endpoint=endpoint
            )
            paths.append(_checked(target / file_name, listed[file_name]))
    return Pulled(wanted, commit, tuple(paths))


def _choose(listed: dict[str, Any], patterns: Sequence[str], repo_id: str) -> list[str]:
    """Names of the files to fetch; every pattern but that of the readme must match one."""
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in listed if fnmatch(name, pattern)}
        if not found and pattern != "README.md":
            raise DataError(f"{repo_id}: no file matches {pattern!r}; there are {', '.join(sorted(listed)) or 'none'}")
        chosen |= found
    return sorted(chosen)


def _checked(path: Path, announced: Any) -> Path:
    """The path, if the file is what the hub announced. Guards against a stale or cut local copy."""
    size = path.stat().st_size
    if announced.size is not None and size != announced.size:
        raise DataError(f"{path}: {size} bytes, but the hub has {announced.size}; delete it and pull again")
    if announced.lfs is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != announced.lfs.sha256:
            raise DataError(f"{path}: its checksum is not the hub's; delete it and pull again")
    return path


@contextmanager
def _explained(repo_id: str, revision: str, endpoint: str) -> Iterator[None]:
    """Whatever the hub's client raises, as one line of ours."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(f"{repo_id}: gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(f"{repo_id}: no such data set at {endpoint}, or it is private (HF_TOKEN opens it)") from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{repo_id}: no revision {revision!r} at {endpoint}") from error
    except errors.OfflineModeIsEnabled as error:
        raise DataError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be fetched") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise DataError(f"{repo_id}: {endpoint} answered HTTP {status}; run the same command again to go on") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:  # type: ignore[attr-defined]
        reason = error.__cause__ or error
        raise DataError(
            f"{repo_id}: cannot reach {endpoint} ({type(reason).__name__}); run the same command again to go on, "
            "or name another hub in HF_ENDPOINT"
        ) from error
    except OSError as error:
        # A full disk, a target that is no folder, or the client's own word for a download that ended short.
        reason_text = error.strerror or " ".join(str(error).split())
        raise DataError(f"{repo_id}: cannot be written or is incomplete ({reason_text})") from error
