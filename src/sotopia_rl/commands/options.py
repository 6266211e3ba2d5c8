"""What several commands share: settings of matches and speakers; manifests by name; finished-work summaries."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import Field

from sotopia_rl import sandbox
from sotopia_rl.config import Config
from sotopia_rl.console import err, used
from sotopia_rl.errors import ConfigError
from sotopia_rl.manifest import Manifest, manifest_from
from sotopia_rl.profiles import SELECTIONS, load_profiles, selected_matches
from sotopia_rl.tally import Tally

DEFAULT_STORE = "episodes.db"
SANDBOX = ("sandbox-train", "sandbox-held-out")
"""Manifests of the offline world, of any size."""


class Drawn(Config):
    """Which matches a manifest's name stands for."""

    count: int = Field(default=40, gt=0)
    """Number of matches, for the sandbox manifests."""
    profiles: Path | None = None
    """Folder with the published SOTOPIA profiles, for the manifests that are played in them."""
    seed: int = 0
    """Of the matches, for manifests that have a name."""


class Speaking(Config):
    """How agents sample."""

    temperature: float = Field(default=0.7, ge=0)
    """Of every agent; 0 is greedy."""
    max_tokens: int = Field(default=512, gt=0)
    """Longest reply of an agent."""


def named_manifest(name: str, drawn: Drawn) -> Manifest:
    """A manifest by name (`sandbox-train`, `sandbox-held-out`, a name of `profiles.SELECTIONS`) or from a file."""
    profiles, seed = drawn.profiles, drawn.seed
    if name == "sandbox-train":
        return Manifest(name=name, matches=tuple(sandbox.matches("train", drawn.count, seed=seed)))
    if name == "sandbox-held-out":
        return Manifest(name=name, matches=tuple(sandbox.matches("held_out", drawn.count, seed=seed)))
    if name in SELECTIONS:
        if profiles is None:
            raise ConfigError(f"{name} is played in the published SOTOPIA profiles; give their folder with --profiles")
        played = selected_matches(load_profiles(profiles), name, seed=seed)
        return Manifest(name=name, matches=tuple(played))
    if not Path(name).exists() and not Path(name).suffix:
        near = difflib.get_close_matches(name, [*SANDBOX, *SELECTIONS], n=1)
        hint = f"did you mean {near[0]}?" if near else "`sotopia-rl manifest list` names those there are"
        raise ConfigError(f"{name}: neither a manifest's name nor a file; {hint}")
    return manifest_from(Path(name), profiles)


def finish(*tallies: Tally, failures: Literal["refuse", "count"] = "refuse") -> None:
    """Say what was done; an error where nothing succeeded, or the work was stopped.

    Args:
        failures: Whether a stage in which everything failed is an error, or the caller counts what it lacks.

    Raises:
        SotopiaRLError: Every item failed, or not every item was tried.
    """
    for tally in tallies:
        extra = used(tally.usage)
        err.print(str(tally) + (f" ({extra})" if extra else ""), markup=False, soft_wrap=True)
        for kind, message in sorted(tally.messages.items()):
            err.print(f"  {kind}: {message}", markup=False, soft_wrap=True)
    for tally in tallies:
        tally.require(some=failures == "refuse")
