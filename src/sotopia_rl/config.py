"""Config classes: one frozen pydantic class per stage, read from YAML, flags or both.

The same class is the YAML schema, the command's flags and the record saved with a run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sotopia_rl.episode import canonical_json, sha256_text
from sotopia_rl.errors import ConfigError


class Config(BaseModel):
    """Base of every stage config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    def key(self) -> str:
        """Hash of the resolved config; equal keys mean equal settings."""
        return sha256_text(canonical_json(self.model_dump(mode="json")))


C = TypeVar("C", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where PyYAML lets the last one win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line, name = key.start_mark.line + 1, (key.tag, key.value)
                if name in lines:
                    raise yaml.YAMLError(f"line {line}: {key.value} stands there twice, first in line {lines[name]}")
                lines[name] = line
        return node


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: It is not YAML, or a key stands twice in a mapping.
    """
    return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506  a SafeLoader


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a mapping.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(data).__name__}")
    return data


def parse_config(cls: type[C], data: object, *, where: str) -> C:
    """`data` as a `cls`; every mistake in it named in one line, with the near name of an unknown key.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type or out of range.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        wrong = [": ".join(filter(None, (".".join(map(str, place)), what))) for place, what in problems(cls, error)]
        raise ConfigError(f"{where}: {'; '.join(wrong)}") from error


def load_config(cls: type[C], path: Path) -> C:
    """Read a `cls` from a YAML file.

    Raises:
        ConfigError: As `read_yaml` and `parse_config`.
    """
    return parse_config(cls, read_yaml(path), where=str(path))


def problems(cls: type[BaseModel], error: ValidationError) -> list[tuple[tuple[int | str, ...], str]]:
    """Where in a `cls` each mistake is, and what it is. A list is not blamed for what is wrong with its items."""
    places = [e["loc"] for e in error.errors()]
    return [
        (e["loc"], _problem(cls, e))
        for e in error.errors()
        if not any(place[: len(e["loc"])] == e["loc"] != place for place in places)
    ]


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Says so, with the near name."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return "unknown key" + (f", did you mean {near[0]!r}?" if near else "")


def _problem(cls: type[BaseModel], error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return unknown_key(str(error["loc"][-1]), _field_names(cls, error["loc"][:-1]))
    said = error["msg"].removeprefix("Value error, ")
    return said if error["type"] in {"value_error", "missing"} else f"{said} (found {error['input']!r:.80})"


def _field_names(cls: type[BaseModel], path: tuple[object, ...]) -> list[str]:
    """Names valid at `path` inside `cls`; empty where the path leaves the plain models."""
    current: Any = cls
    for part in path:
        field = getattr(current, "model_fields", {}).get(str(part))
        if field is None:
            return []
        current = field.annotation
    return list(getattr(current, "model_fields", {}))
