"""The annotator's reply: the JSON shape it is asked for, and the strict reading of it.

Keys are dimension names and turn indices, never people's names. A reply that is incomplete, has a key too many,
or a number that is not a whole number in range, is refused with all that is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sotopia_rl.llm.structured import UnusableReply, extract_json
from sotopia_rl.models import JsonSchema

Ranges = Mapping[str, tuple[int, int]]
"""Least and greatest number by dimension name."""


def reply_schema(ranges: Ranges, turns: Sequence[int]) -> JsonSchema:
    """JSON schema of a reply for these dimensions and turns."""
    return _object({name: _object(dict.fromkeys(map(str, turns), _whole(*r))) for name, r in ranges.items()})


def _whole(low: int, high: int) -> JsonSchema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _object(properties: dict[str, Any]) -> JsonSchema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def parse_reply(text: str, ranges: Ranges, turns: Sequence[int]) -> dict[str, dict[int, int]]:
    """Numbers by dimension and turn index.

    Raises:
        UnusableReply: No JSON object, or its dimensions, turns or numbers are not exactly those asked for.
    """
    data = extract_json(text)
    problems = _key_problems("dimension", data, list(ranges))
    answers: dict[str, dict[int, int]] = {}
    for name, (low, high) in ranges.items():
        if name in data:
            answers[name], wrong = _numbers(data[name], turns, low, high)
            problems += [f"{name}: {problem}" for problem in wrong]
    if problems:
        raise UnusableReply("; ".join(problems))
    return answers


def _numbers(data: object, turns: Sequence[int], low: int, high: int) -> tuple[dict[int, int], list[str]]:
    """The good numbers of one dimension, and what is wrong with the others."""
    if not isinstance(data, dict):
        return {}, [f"expected an object from turn index to number, found {data!r:.40}"]
    good: dict[int, int] = {}
    problems = _key_problems("turn", data, [str(turn) for turn in turns])
    for turn in turns:
        value = data.get(str(turn), low)
        if type(value) is not int:
            problems.append(f"turn {turn}: expected a whole number, found {value!r:.40}")
        elif not low <= value <= high:
            problems.append(f"turn {turn}: {value} is outside {low} to {high}")
        else:
            good[turn] = value
    return good, problems


def _key_problems(kind: str, data: Mapping[Any, object], wanted: Sequence[str]) -> list[str]:
    missing = [key for key in wanted if key not in data]
    extra = [str(key) for key in data if key not in wanted]
    return [f"missing {kind} {key}" for key in missing] + [f"unexpected {kind} {key:.40}" for key in extra]
