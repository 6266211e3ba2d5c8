"""From rows on disk to token ids, the same ids for SFT, reward model and GRPO. No torch here.

A reply's ids are those of its text and one end-of-sequence token; a prompt's ids are the chat template's,
up to where the reply begins. Nothing is ever rendered to text and tokenised a second time.

A prompt that is too long loses its oldest turns and nothing else: the opening (persona, goal), the newest
turns, the instructions and the reply stay. A cut is made only where a turn begins beyond doubt, that is at
a `Turn #k: ` line start which occurs once in the prompt; an utterance that imitates such a line makes its
turn no place to cut, so no fragment of a turn is ever left over.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sotopia_rl.errors import DataError
from sotopia_rl.models import Message
from sotopia_rl.train.config import AdapterSettings

T = TypeVar("T")

TOGETHER = 256
"""Prompts tokenised in one call."""


class PromptLike(Protocol):
    """What every kind of row has."""

    @property
    def prompt(self) -> Sequence[Message]: ...
    @property
    def episode_id(self) -> str: ...
    @property
    def turn(self) -> int: ...
    @property
    def seat(self) -> int: ...


class ReplyLike(PromptLike, Protocol):
    """A row with a reply."""

    @property
    def completion(self) -> Sequence[Message]: ...


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    eos_token_id: int

    def __call__(self, text: str | list[str], *, add_special_tokens: bool) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


R = TypeVar("R", bound=ReplyLike)


@dataclass(frozen=True)
class Encoded:
    """A row as token ids.

    Attributes:
        messages: The prompt after truncation.
        dropped_turns: How many turns the truncation took.
        completion_ids: Empty for a row without a reply.
        talk: Episode and seat, whose prompts grow from row to row.
    """

    messages: tuple[Message, ...]
    prompt_ids: list[int]
    completion_ids: list[int]
    dropped_turns: int
    talk: tuple[str, int]

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.completion_ids


def prompt_token_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids a model is given before it replies."""
    return next(prompts_token_ids(tokenizer, [messages]))


def completion_token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a finished reply, its end-of-sequence token included."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def completions_token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`completion_token_ids` of each text; ten together take an eighth of the time of ten calls."""
    if not texts:  # which tokenizers do not take
        return []
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def prompts_token_ids(tokenizer: Tokenizer, prompts: Sequence[Sequence[Message]]) -> Iterator[list[int]]:
    """The ids of each prompt; tokenised together, which takes half the time, and not all at once, for memory."""
    for start in range(0, len(prompts), TOGETHER):
        chats = [[message.model_dump() for message in prompt] for prompt in prompts[start : start + TOGETHER]]
        encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
        yield from map(list, encoded["input_ids"])


def encode_rows(
    tokenizer: Tokenizer,
    rows: Sequence[PromptLike],
    *,
    max_length: int,
    reply: Callable[[Any], str] | None = None,
) -> list[Encoded]:
    """Turn rows into token ids of at most `max_length`, shortening histories where needed.

    Args:
        reply: The reply of a row; None for rows without one.

    Raises:
        DataError: Rows do not fit even without any history; the first is named, with its length.
    """
    encoded, misfits = [], []
    for row, whole in zip(rows, prompts_token_ids(tokenizer, [row.prompt for row in rows]), strict=True):
        completion = [] if reply is None else completion_token_ids(tokenizer, reply(row))
        fitted = _fit(tokenizer, row, whole, max_length - len(completion), completion)
        if isinstance(fitted, int):
            misfits.append((row, fitted + len(completion)))
        else:
            encoded.append(fitted)
    if misfits:
        row, length = misfits[0]
        raise DataError(
            f"{len(misfits)} of {len(rows)} rows do not fit into {max_length} tokens even without their history; "
            f"the first is episode {row.episode_id}, turn {row.turn}, with {length}; raise the length limit"
        )
    return encoded


def reply_text(row: ReplyLike) -> str:
    """The text of a row's reply."""
    return row.completion[0].content


def _fit(tokenizer: Tokenizer, row: PromptLike, whole: list[int], limit: int, completion: list[int]) -> Encoded | int:
    """The row with as much of its history as fits, or its shortest length where nothing fits.

    Args:
        whole: The ids of the whole prompt.
    """
    talk = (row.episode_id, row.seat)
    if len(whole) <= limit:
        return Encoded(tuple(row.prompt), whole, completion, 0, talk)
    cuts = [0, *history_cuts(row.prompt[-1].content, row.turn)]
    ids_at = {0: whole}

    def length(place: int) -> int:
        ids_at[place] = prompt_token_ids(tokenizer, shortened(row.prompt, cuts, place))
        return len(ids_at[place])

    low, high = 0, len(cuts) - 1
    if high == 0 or length(high) > limit:
        return min(len(ids) for ids in ids_at.values())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if length(middle) <= limit else (middle, high)
    dropped = _turns_before(row, cuts[high])
    return Encoded(tuple(shortened(row.prompt, cuts, high)), ids_at[high], completion, dropped, talk)


def history_cuts(prompt: str, turn: int) -> list[int]:
    """Places before which the history may be cut away, oldest first: turn starts, then its end.

    Args:
        prompt: A prompt at turn `turn`, as `observe.agent_prompt` renders it: an opening, one
            `Turn #k: ` paragraph per turn, then `You are at Turn #...`.
        turn: How many turns have been taken.
    """
    end = prompt.rfind(f"You are at Turn #{turn}")
    if turn == 0 or end < 0:
        return []
    starts = [_only_line_start(prompt, f"Turn #{index}: ") for index in range(turn)]
    if starts[0] is None:
        return []
    return [*(start for start in starts if start is not None), end]


def _only_line_start(text: str, marker: str) -> int | None:
    """Where a line of `text` starts with `marker`, if exactly one does."""
    place = text.find("\n" + marker)
    if place < 0 or text.find("\n" + marker, place + 1) >= 0:
        return None
    return place + 1


def shortened(prompt: Sequence[Message], cuts: Sequence[int], place: int) -> list[Message]:
    """The prompt without the history before `cuts[place]`; `place` 0 leaves it whole."""
    if place == 0:
        return list(prompt)
    text = prompt[-1].content
    return [*prompt[:-1], prompt[-1].model_copy(update={"content": text[: cuts[1]] + text[cuts[place] :]})]


def _turns_before(row: PromptLike, cut: int) -> int:
    text = row.prompt[-1].content[: cut + 1]
    return sum(text.find(f"\nTurn #{index}: ") >= 0 for index in range(row.turn))


def split_by_episode(
    rows: Sequence[T], episode: Callable[[T], str], share: float, seed: int
) -> tuple[list[T], list[T]]:
    """Divide rows into training and held-out ones so that no episode stands on both sides.

    The held-out side gets `share` of the episodes, at least one if `share` is above zero and there are two.
    """
    episodes = sorted({episode(row) for row in rows})
    random.Random(seed).shuffle(episodes)
    count = min(len(episodes) - 1, max(1, round(share * len(episodes)))) if share > 0 else 0
    held_out = set(episodes[:count])
    return [r for r in rows if episode(r) not in held_out], [r for r in rows if episode(r) in held_out]


@dataclass(frozen=True)
class Divided(Generic[R]):
    """The rows of a stage on both sides of the split by episode, and the same rows as token ids.

    Attributes:
        training, held_out: As they were read.
        train_rows, eval_rows: One for each of them, in their order.
    """

    training: list[R]
    held_out: list[R]
    train_rows: list[Encoded]
    eval_rows: list[Encoded]

    def facts(self) -> dict[str, object]:
        """Counts for the record of the run."""
        return {
            "data": length_report([*self.train_rows, *self.eval_rows]),
            "episodes": len({row.episode_id for row in (*self.training, *self.held_out)}),
            "held_out_rows": len(self.eval_rows),
        }


def divided(tokenizer: Tokenizer, rows: Sequence[R], settings: AdapterSettings) -> Divided[R]:
    """Split rows by episode and turn them into token ids, as the settings say.

    Raises:
        DataError: As `encode_rows`.
    """
    training, held_out = split_by_episode(rows, lambda row: row.episode_id, settings.held_out_share, settings.seed)
    encoded = [
        encode_rows(tokenizer, side, max_length=settings.max_length, reply=reply_text) for side in (training, held_out)
    ]
    return Divided(training, held_out, *encoded)


def length_report(encoded: Iterable[Encoded]) -> dict[str, int]:
    """Counts for the record: rows, the longest one, rows that were shortened, turns left out."""
    rows = list(encoded)
    return {
        "rows": len(rows),
        "longest_tokens": max(len(row.ids) for row in rows),
        "shortened_rows": sum(row.dropped_turns > 0 for row in rows),
        "dropped_turns": sum(row.dropped_turns for row in rows),
    }
