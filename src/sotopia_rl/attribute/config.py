"""What to attribute, by which method, and how the annotator is asked."""

from __future__ import annotations

from importlib import resources
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sotopia_rl.config import Config
from sotopia_rl.dimensions import Dimension, load_dimensions
from sotopia_rl.episode import Sampling

MethodName = Literal[
    "direct",
    "direct_normalised",
    "singular",
    "scaled",
    "uniform",
    "uniform_split",
    "goal_progress",
    "response_only",
    "utterance_quality",
    "counterfactual",
    "exact",
]


def _built_in() -> dict[str, Dimension]:
    with resources.as_file(resources.files("sotopia_rl.prompts").joinpath("attribution_dimensions.yaml")) as path:
        return {d.name: d for d in load_dimensions(path)}


BUILT_IN = _built_in()
"""SOTOPIA's seven dimensions and conversation_behaviour, which no judge scores (see `reward.py`), by name."""

SCALED = frozenset({"direct", "direct_normalised", "response_only", "utterance_quality"})
"""Methods in which the annotator uses `scale`."""
COMPUTED_METHODS = frozenset({"uniform", "uniform_split", "scaled", "exact"})
"""Methods that ask no annotator."""


class AttributionConfig(Config):
    """How episode scores are attributed to utterances."""

    method: MethodName = Field(default="direct")
    """The attribution method; `docs/attribution.md` describes each."""
    dimensions: Annotated[tuple[str, ...], Field(min_length=1)] = ("goal", "relationship", "knowledge")
    """Dimensions to attribute, by name."""
    custom_dimensions: tuple[Dimension, ...] = ()
    """Dimensions beyond SOTOPIA's seven and conversation_behaviour."""
    scale: Literal[3, 5, 10] = 3
    """Top weight of the direct methods, response_only and utterance_quality."""
    view: Literal["offline", "online"] = "offline"
    """offline: the whole episode is in view; online: an utterance is rated from what came up to it."""
    together: bool = True
    """All dimensions in one call; otherwise one call each, so that one can fail without the others."""
    show_scores: bool = True
    """Tell the annotator the episode's scores (never in the online view, where the outcome is unknown)."""
    discount: float = Field(default=0.9, gt=0, lt=1)
    """Of the scaled method: what is left of the credit for each later utterance of the agent."""
    samples: int = Field(default=1, ge=1)
    """Self-consistency: answers per question, averaged, their spread kept."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the annotator; above 0 when there are several samples."""
    max_tokens: int = Field(default=1024, gt=0)
    """Longest reply of the annotator."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a question is asked before its item fails."""
    seed: int = 0
    """Of the annotator's sampling."""

    @field_validator("dimensions")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"a dimension is named twice in {', '.join(names)}")
        return names

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = {**BUILT_IN, **{d.name: d for d in self.custom_dimensions}}
        unknown = [name for name in self.dimensions if name not in known]
        if unknown:
            raise ValueError(f"unknown dimension {', '.join(unknown)}; known: {', '.join(known)}")
        clash = [d.name for d in self.custom_dimensions if d.name in BUILT_IN]
        if clash:
            raise ValueError(f"custom dimension {', '.join(clash)} has the name of a built-in one")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} samples at temperature 0 are all the same; set a temperature")
        if self.view == "online" and self.method in COMPUTED_METHODS | {"singular", "response_only", "counterfactual"}:
            raise ValueError(f"{self.method} needs more than the turns up to an utterance and has no online view")
        return self

    @property
    def label(self) -> str:
        """The method's name in records and files: everything that changes what a weight means."""
        parts: list[str] = [self.method]
        if self.method in SCALED and self.scale != 3:
            parts.append(str(self.scale))
        if self.method == "scaled" and self.discount != 0.9:
            parts.append(f"{self.discount:g}")
        if self.view == "online":
            parts.append("online")
        return "-".join(parts)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Dimensions that one question is about."""
        return [self.dimensions] if self.together else [(name,) for name in self.dimensions]

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)

    def dimension(self, name: str) -> Dimension:
        """The dimension called `name`."""
        return {**BUILT_IN, **{d.name: d for d in self.custom_dimensions}}[name]
