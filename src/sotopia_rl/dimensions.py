"""What a judge rates: dimensions with their ranges, and the JSON shapes in which it is asked to answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sotopia_rl.config import Config, load_config
from sotopia_rl.episode import Record
from sotopia_rl.models import JsonSchema

ReplyForm = Literal["default", "0.1.0rc5", "0.1.4", "0.1.5"]
"""Ours, or that of a published SOTOPIA version."""


class Dimension(Record):
    """One thing that a judge gives points for.

    `low` and `high` are the ends of its range, both included; `description` tells the judge what to look at.
    """

    name: str = Field(pattern=r"^\w[\w-]*$")
    low: int
    high: int
    description: str = Field(min_length=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be below high in {self.name!r} ({self.low} to {self.high})")
        return self


class _DimensionFile(Config):
    """A file of dimensions."""

    dimensions: Annotated[tuple[Dimension, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [d.name for d in self.dimensions]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"dimensions named twice: {', '.join(doubles)}")
        return self


def load_dimensions(path: Path) -> tuple[Dimension, ...]:
    """Read dimensions from a YAML file: `dimensions:`, a list of name, low, high and description.

    Raises:
        ConfigError: The file cannot be read or says something else.
    """
    return load_config(_DimensionFile, path).dimensions


def _sotopia_dimensions() -> tuple[Dimension, ...]:
    with resources.as_file(resources.files("sotopia_rl.prompts").joinpath("sotopia_eval.yaml")) as path:
        return load_dimensions(path)


SOTOPIA_DIMENSIONS = _sotopia_dimensions()
"""SOTOPIA-EVAL's seven, in its order."""


def judge_schema(
    dimensions: Sequence[Dimension], *, describe: bool = False, max_reason_chars: int | None = None
) -> JsonSchema:
    """JSON schema of our reply form: agent, then dimension, then `reasoning` and `score`.

    Args:
        describe: Put the descriptions in, as the judge's prompt does. A schema that only constrains the
            decoding needs none.
        max_reason_chars: Longest reasoning allowed, for small models that otherwise never end one.
    """
    reasoning: JsonSchema = {"type": "string"}
    if max_reason_chars is not None:
        reasoning["maxLength"] = max_reason_chars
    ratings: JsonSchema = {}
    for d in dimensions:
        score = {"type": "integer", "minimum": d.low, "maximum": d.high}
        about = {"description": d.description} if describe else {}
        ratings[d.name] = {**about, **_closed({"reasoning": reasoning, "score": score})}
    agent = {"$ref": "#/$defs/Ratings"}
    return {"$defs": {"Ratings": _closed(ratings)}, **_closed({"agent_1": agent, "agent_2": agent})}


def _closed(properties: JsonSchema) -> JsonSchema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def schema_text(dimensions: Sequence[Dimension], form: ReplyForm) -> str:
    """The schema as it stands in a judge's prompt; the published forms equal SOTOPIA's own, byte for byte."""
    return _schema_text(tuple(dimensions), form)


@lru_cache(maxsize=64)
def _schema_text(dimensions: tuple[Dimension, ...], form: ReplyForm) -> str:
    builders = {"0.1.0rc5": _rc5_schema, "0.1.4": _two_agents_schema, "0.1.5": _agents_schema}
    schema = judge_schema(dimensions, describe=True) if form == "default" else builders[form](dimensions)
    return json.dumps(schema)


_TITLE = "SotopiaDimensions"
_ABOUT = "The social dimensions used in Sotopia paper (ICLR 2024)"
_PAIR = [{"type": "string"}, {"type": "integer"}]


def _title(dimension: Dimension) -> str:
    return dimension.name.replace("_", " ").title()


def _rc5_schema(dimensions: Sequence[Dimension]) -> JsonSchema:
    """As pydantic 1 wrote it."""
    keys = ["agent_1_evaluation", "agent_2_evaluation"]
    properties = {
        d.name: {
            "title": _title(d),
            "description": d.description,
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": _PAIR,
        }
        for d in dimensions
    }
    one = {"title": _TITLE, "description": _ABOUT, "type": "object"}
    return {
        "properties": {key: {"$ref": f"#/definitions/{_TITLE}"} for key in keys},
        "required": keys,
        "definitions": {_TITLE: {**one, "properties": properties, "required": list(properties)}},
    }


def _pairs_definition(dimensions: Sequence[Dimension]) -> JsonSchema:
    """As pydantic 2 writes it: keys sorted."""
    properties = {
        d.name: {
            "description": d.description,
            "maxItems": 2,
            "minItems": 2,
            "prefixItems": _PAIR,
            "title": _title(d),
            "type": "array",
        }
        for d in dimensions
    }
    one = {"description": _ABOUT, "properties": properties, "required": list(properties)}
    return {_TITLE: {**one, "title": _TITLE, "type": "object"}}


def _two_agents_schema(dimensions: Sequence[Dimension]) -> JsonSchema:
    keys = ["agent_1_evaluation", "agent_2_evaluation"]
    return {
        "$defs": _pairs_definition(dimensions),
        "properties": {key: {"$ref": f"#/$defs/{_TITLE}"} for key in keys},
        "required": keys,
        "title": f"EvaluationForTwoAgents[{_TITLE}]",
        "type": "object",
    }


def _agents_schema(dimensions: Sequence[Dimension]) -> JsonSchema:
    every = {"additionalProperties": {"$ref": f"#/$defs/{_TITLE}"}, "title": "Evaluations", "type": "object"}
    return {
        "$defs": _pairs_definition(dimensions),
        "properties": {"evaluations": every},
        "required": ["evaluations"],
        "title": f"EvaluationForAgents[{_TITLE}]",
        "type": "object",
    }
