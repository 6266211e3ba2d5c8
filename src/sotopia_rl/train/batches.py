"""Token ids as the data sets and batches that trainers take. Letters: B rows of a batch, T tokens, D outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset

from sotopia_rl.train.data import Encoded

IGNORED = -100
"""Label of a token that has no part in the loss."""


def language_rows(encoded: Sequence[Encoded], *, loss_on: Literal["all", "reply"]) -> Dataset:
    """Rows for a language model: ids, and labels on every token or on the reply's only."""
    return Dataset.from_list([{"input_ids": row.ids, "labels": _labels(row, loss_on)} for row in encoded])


def _labels(row: Encoded, loss_on: Literal["all", "reply"]) -> list[int]:
    if loss_on == "all":
        return row.ids
    return [IGNORED] * len(row.prompt_ids) + row.completion_ids


def target_rows(encoded: Sequence[Encoded], targets: Sequence[Sequence[float]]) -> Dataset:
    """Rows for a regression: ids and targets [D]."""
    rows = zip(encoded, targets, strict=True)
    return Dataset.from_list([{"input_ids": row.ids, "labels": list(target)} for row, target in rows])


@dataclass(frozen=True)
class TokenPadding:
    """Collates rows with a label per token into right-padded tensors [B, T]."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        labels = padded([row["labels"] for row in rows], IGNORED)
        return padded_inputs([row["input_ids"] for row in rows], self.pad_token_id) | {"labels": labels}


@dataclass(frozen=True)
class TargetPadding:
    """Collates rows with targets [D] into right-padded ids [B, T] and labels [B, D]."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row["labels"] for row in rows], dtype=torch.float32)
        return padded_inputs([row["input_ids"] for row in rows], self.pad_token_id) | {"labels": labels}


def padded_inputs(ids: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Ids and attention mask, both [B, T], every row filled up at its right end."""
    return {"input_ids": padded(ids, pad_token_id), "attention_mask": padded([[1] * len(row) for row in ids], 0)}


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """[B, T] with every row filled up at its right end."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
