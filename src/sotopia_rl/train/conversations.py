"""Several rows of one conversation in one pass: what their prompts have in common is read once.

A prompt repeats all of the one before it but the instructions at its end. Rows are therefore laid out as a tree: each
adds only the tokens in which it differs from the row before, and the attention mask shows it its own tokens and nothing
else. Positions count along the row, so that every row's numbers are those that it has alone.

Letters: P conversations of a batch, N tokens of one, R rows of a batch, D targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from sotopia_rl.errors import ConfigError
from sotopia_rl.llm.prefill import can_prefill
from sotopia_rl.train.batches import IGNORED, padded
from sotopia_rl.train.data import Encoded

ENDS = "ends"
ROW_TOKENS = "row_tokens"
"""Key of the number of tokens that the rows of a conversation have, those that they share counted for each."""

Packed = dict[str, Any]
"""A conversation as a row of a data set.

`input_ids`, `labels` and `position_ids` [N]; for each of its rows `starts`, where its own tokens begin, and `shared`,
with how many tokens of the row before it it begins; for a regression `targets` [R, D].
"""


def conversations(
    rows: Sequence[Encoded], max_length: int, targets: Sequence[Sequence[float]] | None = None
) -> Dataset:
    """The rows, those of a conversation together.

    Args:
        max_length: Of a row; a conversation of more than twice as many tokens is divided, for the sake of memory.
        targets: [D] of each row, for a regression.
    """
    by_talk: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        by_talk.setdefault(row.talk, []).append(number)
    return Dataset.from_list(
        [pack for numbers in by_talk.values() for pack in _packs(rows, numbers, 2 * max_length, targets)]
    )


def _packs(
    rows: Sequence[Encoded], numbers: Sequence[int], limit: int, targets: Sequence[Sequence[float]] | None
) -> Iterator[Packed]:
    """In the order of their tokens, where no earlier row has more in common with a row than the one before it."""
    pack: Packed = {}
    before: list[int] = []
    for number in sorted(numbers, key=lambda number: rows[number].ids):
        row = rows[number]
        shared = _in_common(before, row.prompt_ids[:-1])  # the last one foretells the reply's first
        if pack and len(pack["input_ids"]) + len(row.ids) - shared > limit:
            yield pack
            pack = {}
        if not pack:
            shared = 0
            pack = {name: [] for name in ("input_ids", "labels", "position_ids", "starts", "shared")}
            pack |= {} if targets is None else {"targets": []}
        pack["starts"].append(len(pack["input_ids"]))
        pack["shared"].append(shared)
        pack["input_ids"] += row.ids[shared:]
        pack["labels"] += [IGNORED] * (len(row.prompt_ids) - shared) + row.completion_ids
        pack["position_ids"] += range(shared, len(row.ids))
        if targets is not None:
            pack["targets"].append(list(targets[number]))
        before = row.ids
    yield pack


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    differs = np.array(one[:length]) != np.array(other[:length])
    return int(differs.argmax()) if differs.any() else length


def _ends(pack: Mapping[str, Sequence[int]]) -> list[int]:
    """Where each row's own tokens end."""
    return [*pack["starts"][1:], len(pack["input_ids"])]


def visible(pack: Mapping[str, Sequence[int]]) -> torch.Tensor:
    """[N, N], whether a token (first axis) sees another: its own row's, up to itself."""
    count = len(pack["input_ids"])
    mask_NN = torch.zeros(count, count, dtype=torch.bool)
    path = torch.empty(0, dtype=torch.long)
    for start, end, shared in zip(pack["starts"], _ends(pack), pack["shared"], strict=True):
        own = torch.arange(start, end)
        path = path[:shared]
        mask_NN[start:end, path] = True
        mask_NN[start:end, start:end] = own[:, None] >= own
        path = torch.cat([path, own])
    return mask_NN


@dataclass(frozen=True)
class ConversationPadding:
    """Collates conversations into right-padded tensors.

    Attributes:
        additive: Masks as numbers to add to attention scores, which `eager` attention wants, instead of booleans.
    """

    pad_token_id: int
    additive: bool

    def __call__(self, packs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Ids and positions [P, N], the mask [P, 1, N, N], labels [P, N], and `ROW_TOKENS` [P].

        With targets, labels are these [R, D], and `ENDS` [R, 2] tells where each row's last token stands.
        """
        longest = max(len(pack["input_ids"]) for pack in packs)
        mask = torch.eye(longest, dtype=torch.bool).repeat(len(packs), 1, 1, 1)  # padding sees itself
        for place, pack in enumerate(packs):
            count = len(pack["input_ids"])
            mask[place, 0, :count, :count] = visible(pack)
        batch = {
            "input_ids": padded([pack["input_ids"] for pack in packs], self.pad_token_id),
            "position_ids": padded([pack["position_ids"] for pack in packs], 0),
            "attention_mask": _as_numbers(mask) if self.additive else mask,
            ROW_TOKENS: torch.tensor([len(pack["input_ids"]) + sum(pack["shared"]) for pack in packs]),
        }
        if "targets" not in packs[0]:
            return batch | {"labels": padded([pack["labels"] for pack in packs], IGNORED)}
        ends = [(place, end - 1) for place, pack in enumerate(packs) for end in _ends(pack)]
        targets = [target for pack in packs for target in pack["targets"]]
        return batch | {ENDS: torch.tensor(ends), "labels": torch.tensor(targets, dtype=torch.float32)}


def _as_numbers(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def conversation_padding(config: Any, pad_token_id: int) -> ConversationPadding:
    """The collator for a model.

    Raises:
        ConfigError: Its attention is not one that takes such a mask.
    """
    attention = config._attn_implementation  # noqa: SLF001 - transformers tells it nowhere else
    if not can_prefill(config) or attention not in {"sdpa", "eager"}:
        raise ConfigError(
            "packing: conversation needs a model whose layers are all full attention, with attention: sdpa or eager "
            f"(here {config.model_type}, {attention}); use packing: packed, or none"
        )
    return ConversationPadding(pad_token_id, additive=attention == "eager")
