"""Figures that others have published, each with its source, partner and judge. None of them is paired with ours."""

from __future__ import annotations

from importlib.resources import files

import yaml
from pydantic import Field, TypeAdapter

from sotopia_rl.episode import Record


class Published(Record):
    """One figure, as it was read."""

    system: str
    manifest: str
    """The published list of scenarios: sotopia-hard or sotopia-all."""
    metric: str
    value: float
    plus_minus: float | None = None
    """As printed; what it stands for is in `read` where the source says so."""
    partner: str
    """Empty where the source that was read does not state it."""
    judge: str
    episodes: int | None = Field(default=None, gt=0)
    source: str
    read: str
    """Where the figure was read when it was entered."""


def published_results() -> tuple[Published, ...]:
    """What `data/published.yaml` holds."""
    text = (files("sotopia_rl") / "data" / "published.yaml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[Published, ...]).validate_python(yaml.safe_load(text))


def beside(manifest: str) -> list[Published]:
    """The figures over the scenarios of a manifest, by its name; all of them where the name is none of theirs."""
    every = published_results()
    fitting = [figure for figure in every if manifest.startswith(figure.manifest)]
    return fitting or list(every)
