"""Find the one JSON object in a model's reply: tolerant about wrapping, strict about content.

Taken off: reasoning blocks (`<think>...</think>`), code fences, text before and after. Read in spite of small
slips: single quotes, trailing commas, raw line breaks inside strings, Python's True, False and None.
Never done: closing what was cut off, choosing between two objects, guessing at a broken string. Every refusal
says what is wrong in words that the model can act on, because it is told them when it is asked again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

JsonObject = dict[str, Any]

MAX_DEPTH = 64
"""Objects and lists nested deeper than this are refused."""

# What matters outside a JSON value: braces and the tags of reasoning blocks.
_MARK = re.compile(r"[{}]|</?think(?:ing)?>")
_THINK_END = re.compile(r"</think(?:ing)?>")
# A brace in prose that can be no JSON object: {name}, {your answer}.
_PLACEHOLDER = re.compile(r"\{\s*[\w<>./-][\w <>./-]*\}")
_LIST_START = re.compile(r"\s*\[\s*[\[{\"\d]")
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORD = re.compile(r"[A-Za-z_]\w*")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class UnusableReply(ValueError):
    """A parser's word for what is wrong with a reply, told to the model when it is asked again."""


def extract_json(text: str) -> JsonObject:
    """The one JSON object in `text`.

    Raises:
        UnusableReply: There is none, it is incomplete or broken, a key stands twice in it, it holds NaN or
            Infinity, or there are two different ones.
    """
    found = list(_objects(text))
    if not found:
        raise UnusableReply(_nothing_found(text))
    if any(_canonical(value) != _canonical(found[0]) for value in found[1:]):
        raise UnusableReply(f"the reply holds {len(found)} different JSON objects; reply with exactly one")
    return found[0]


def _objects(text: str) -> list[JsonObject]:
    """Every top-level JSON object outside reasoning blocks, in order."""
    found: list[JsonObject] = []
    at = 0
    while mark := _MARK.search(text, at):
        at = mark.end()
        if mark[0] == "{":
            if placeholder := _PLACEHOLDER.match(text, mark.start()):
                at = placeholder.end()
                continue
            _refuse_list(text, mark.start())
            value, at = _read_object(text, mark.start())
            found.append(value)
        elif mark[0] == "}":
            raise UnusableReply(f"there is a closing brace too many after {_tail(text, mark.start())}")
        elif mark[0].startswith("</"):
            # A reasoning block whose opening tag was part of the prompt: what came before was thinking.
            found = []
        else:
            end = _THINK_END.search(text, at)
            if end is None:
                raise UnusableReply(f"the reply stops inside {mark[0]}: the answer is missing")
            at = end.end()
    return found


def _refuse_list(text: str, start: int) -> None:
    before = text[:start].rstrip()
    if before.endswith("[") or _LIST_START.match(text):
        raise UnusableReply("the reply is a list; reply with one JSON object, not in brackets")


def _nothing_found(text: str) -> str:
    if not text.strip():
        return "the reply is empty; reply with one JSON object"
    if _THINK_END.search(text):
        return "there is no JSON object after the reasoning; reply with one JSON object"
    return "the reply holds no JSON object; reply with one JSON object and nothing else"


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _tail(text: str, end: int, *, length: int = 40) -> str:
    """The last characters before `end`, quoted, to show the model where it went wrong."""
    return repr(text[max(0, end - length) : end])


# Strict reading first: the C scanner of the standard library, which takes almost every reply.


def _no_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise UnusableReply(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return value


def _no_constant(word: str) -> NoReturn:
    raise UnusableReply(f"{word} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise UnusableReply(f"the number {digits[:20]} is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 20:  # beyond 64 bits: no count, score or index of ours is so long
        raise UnusableReply(f"the number {digits[:20]}... is too large")
    return int(digits)


_STRICT = json.JSONDecoder(
    strict=False,  # raw line breaks and tabs inside strings pass
    object_pairs_hook=_no_duplicates,
    parse_constant=_no_constant,
    parse_float=_finite,
    parse_int=_whole,
)


def _read_object(text: str, start: int) -> tuple[JsonObject, int]:
    """The object that opens at `start`, and where it ends."""
    try:
        value, end = _STRICT.raw_decode(text, start)
        if _depth(value) > MAX_DEPTH:
            raise UnusableReply(_too_deep())
    except json.JSONDecodeError:
        reader = _LenientReader(text, start)
        value, end = reader.value(0), reader.at
    except RecursionError:
        raise UnusableReply(_too_deep()) from None
    if "\\u" in text[start:end]:
        _refuse_half_characters(value)
    return value, end


def _too_deep() -> str:
    return f"the JSON is nested more than {MAX_DEPTH} levels deep"


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _refuse_half_characters(value: JsonObject) -> None:
    """A lone surrogate escape is valid JSON but no text: nothing could store it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UnusableReply("a \\u escape stands for half a character; write the character itself") from None


class _LenientReader:
    """JSON with the few slips that leave no doubt about what was meant."""

    def __init__(self, text: str, start: int) -> None:
        self.text = text
        self.at = start

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise UnusableReply(_too_deep())
        first = self._next("a value")
        if first == "{":
            return self._object(depth)
        if first == "[":
            return self._list(depth)
        if first in "\"'":
            return self._string(first)
        return self._number_or_word()

    def _object(self, depth: int) -> JsonObject:
        pairs: list[tuple[str, Any]] = []
        self.at += 1
        while (first := self._next("a key or }")) != "}":
            if first not in "\"'":
                raise self._broken("expected a key in double quotes")
            key = self._string(first)
            if self._next("a colon") != ":":
                raise self._broken(f"expected a colon after the key {key!r}")
            self.at += 1
            pairs.append((key, self.value(depth + 1)))
            self._comma_or("}")
        self.at += 1
        return _no_duplicates(pairs)

    def _list(self, depth: int) -> list[Any]:
        values: list[Any] = []
        self.at += 1
        while self._next("a value or ]") != "]":
            values.append(self.value(depth + 1))
            self._comma_or("]")
        self.at += 1
        return values

    def _comma_or(self, close: str) -> None:
        found = self._next(f"a comma or {close}")
        if found == ",":
            self.at += 1
        elif found != close:
            raise self._broken(f'expected a comma or {close} (a quotation mark inside a string is written \\")')

    def _string(self, quote: str) -> str:
        parts: list[str] = []
        plain = re.compile(rf"[^{quote}\\]*")
        self.at += 1
        while True:
            run = plain.match(self.text, self.at)
            assert run is not None  # the pattern matches the empty text
            parts.append(run[0])
            self.at = run.end()
            if self.at >= len(self.text):
                raise self._cut_off()
            self.at += 1
            if self.text[self.at - 1] == quote:
                return "".join(parts)
            parts.append(self._escape())

    def _escape(self) -> str:
        kind = self.text[self.at : self.at + 1]
        if kind == "u":
            digits = self.text[self.at + 1 : self.at + 5]
            if not re.fullmatch(r"[0-9a-fA-F]{4}", digits):
                raise self._cut_off() if self.at + 5 > len(self.text) else self._broken("four digits follow \\u")
            self.at += 5
            return self._whole_character(chr(int(digits, 16)))
        if kind not in _ESCAPES:
            problem = f"\\{kind} is no escape; write \\\\ for a backslash"
            raise self._broken(problem) if kind else self._cut_off()
        self.at += 1
        return _ESCAPES[kind]

    def _whole_character(self, first: str) -> str:
        """Join a pair of surrogate escapes; a lone one is left for the check at the end."""
        second = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})").match(self.text, self.at)
        if not "\ud800" <= first <= "\udbff" or second is None:
            return first
        self.at = second.end()
        return (first + chr(int(second[1], 16))).encode("utf-16", "surrogatepass").decode("utf-16")

    def _number_or_word(self) -> Any:
        for pattern, read in ((_NUMBER, self._number), (_WORD, self._word)):
            if match := pattern.match(self.text, self.at):
                if match.end() == len(self.text):
                    raise self._cut_off()
                value = read(match)
                self.at = match.end()
                return value
        raise self._broken("expected a value")

    def _number(self, match: re.Match[str]) -> float | int:
        number: Callable[[str], float | int] = _finite if match[1] or match[2] else _whole
        return number(match[0])

    def _word(self, match: re.Match[str]) -> bool | None:
        if match[0] in {"NaN", "Infinity"}:
            _no_constant(match[0])
        if match[0] not in _WORDS:
            raise self._broken(f"{match[0]!r} needs double quotes")
        return _WORDS[match[0]]

    def _next(self, wanted: str) -> str:
        """The next character that is no white space; the reader stands on it."""
        space = _SPACE.match(self.text, self.at)
        assert space is not None  # the pattern matches the empty text
        self.at = space.end()
        if self.at >= len(self.text):
            raise self._cut_off(f", before {wanted}")
        return self.text[self.at]

    def _cut_off(self, where: str = "") -> UnusableReply:
        tail = _tail(self.text, len(self.text))
        return UnusableReply(f"the reply stops in the middle of the JSON object{where}; its end is {tail}")

    def _broken(self, problem: str) -> UnusableReply:
        here = repr(self.text[self.at : self.at + 20])
        return UnusableReply(f"the JSON is broken at {here} after {_tail(self.text, self.at)}: {problem}")
