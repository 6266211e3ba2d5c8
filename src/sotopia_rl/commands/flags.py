"""Settings from defaults, a config file and flags, and one line for what is wrong with them.

Flags reach a command unchecked (`Flags`), because a file may complete them; `resolve` checks both together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, TypeVarTuple, cast, get_args

from cyclopts import CycloptsError, Parameter, UnknownOptionError
from pydantic import ValidationError
from pydantic_core import core_schema

from sotopia_rl.config import Config, problems, read_yaml, unknown_key
from sotopia_rl.errors import ConfigError

C = TypeVar("C", bound=Config)
Configs = TypeVarTuple("Configs")


def unchecked(cls: type[C], given: Mapping[str, Any]) -> C:
    """A `cls` for `resolve`: holds what was given as it was given, of whatever type."""
    return cast("C", cls.model_construct(_fields_set=set(given), **given))


class _Unchecked:
    """Leaves the checks of a config class to `resolve`."""

    def __get_pydantic_core_schema__(self, cls: type[Config], _: object) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda given: unchecked(cls, given))


Flags = Annotated[C, Parameter(name="*"), _Unchecked()]
"""A parameter of a command with a flag per field of a config class. Only `resolve` may read it."""


def resolve(file: Path | None, *flags: *Configs, sections: Mapping[type[Config], str] | None = None) -> tuple[*Configs]:
    """Settings by precedence: the defaults of their classes, then the file, then the flags that were given.

    Args:
        sections: Classes whose settings stand in a mapping of the file, under this key; the others' stand on top.

    Raises:
        ConfigError: The file or a flag is wrong, or the settings contradict one another. Every mistake is named.
    """
    written = {} if file is None else read_yaml(file)
    checked, wrong, known = [], [], []
    for config in cast("tuple[Config, ...]", flags):
        fields, section = type(config).model_fields, (sections or {}).get(type(config))
        known += [section] if section else list(fields)
        ours = written.get(section) or {} if section else {key: written[key] for key in fields if key in written}
        if not isinstance(ours, dict):
            wrong.append(f"{file}: {section}: expected a mapping of settings, found {type(ours).__name__}")
            continue
        given = {name: _none_by_name(config, name) for name in config.model_fields_set}
        try:
            checked.append(type(config).model_validate({**ours, **given}))
        except ValidationError as error:
            source = f"{file}: " if ours else ""
            wrong += [_named(place, section, given, source) + what for place, what in problems(type(config), error)]
    wrong += [f"{file}: {key}: {unknown_key(str(key), known)}" for key in written if key not in known]
    if wrong:
        raise ConfigError("; ".join(wrong))
    return cast("tuple[*Configs]", tuple(checked))


def _none_by_name(config: Config, name: str) -> object:
    """What a flag was given; `none` and `null` mean None where the setting takes it, as in a file."""
    value = getattr(config, name)
    optional = type(None) in get_args(type(config).model_fields[name].annotation)
    return None if optional and str(value).lower() in {"none", "null"} else value


def _named(place: tuple[int | str, ...], section: str | None, given: Mapping[str, Any], source: str) -> str:
    """A setting as whoever gave it wrote it: the flag, or the file and the key; `source` for settings together."""
    if not place:
        return source
    field, *rest = map(str, place)
    dotted = ".".join(filter(None, (section, field.replace("_", "-") if field in given else field, *rest)))
    return f"--{dotted}: " if field in given else f"{source}{dotted}: "


def wrong_flag(error: CycloptsError) -> str:
    """What is wrong with the command line, in one line."""
    if isinstance(error, UnknownOptionError):
        typed = (error.token.keyword or error.token.value).partition("=")[0]
        names = {name.lstrip("-"): name for argument in error.argument_collection for name in argument.names}
        near = difflib.get_close_matches(typed.lstrip("-"), names, n=1)
        return f"{typed}: no such flag" + (f", did you mean {names[near[0]]}?" if near else "")
    cause = error.__cause__
    if error.argument is not None and isinstance(cause, ValidationError):
        first = cause.errors()[0]
        return f"{error.argument.name}: {first['msg']} (found {first['input']!r:.80})"
    if error.argument is not None and isinstance(cause, json.JSONDecodeError):
        return f"{error.argument.name}: not JSON ({cause.msg})"
    return " ".join(str(error).split())
