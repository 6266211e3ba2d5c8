"""Token ids as the data sets and batches that trainers take. Letters: B rows of a batch, T tokens, D outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from sotopia_rl.train.data import Encoded

IGNORED = -100
"""Label of a token that has no part in the loss."""


def language_rows(encoded: Sequence[Encoded]) -> Dataset:
    """Rows for a language model: ids, and labels on the reply's tokens only."""
    return Dataset.from_list(
        [{"input_ids": row.ids, "labels": [IGNORED] * len(row.prompt_ids) + row.completion_ids} for row in encoded]
    )


def weighted_rows(encoded: Sequence[Encoded], prompt_weight: float) -> Dataset:
    """Rows for a language model with a loss weight per token: 1 on the reply, `prompt_weight` before it."""
    return Dataset.from_list(
        [
            {"input_ids": row.ids, "weights": [prompt_weight] * len(row.prompt_ids) + [1.0] * len(row.completion_ids)}
            for row in encoded
        ]
    )


def target_rows(encoded: Sequence[Encoded], targets: Sequence[Sequence[float]]) -> Dataset:
    """Rows for a regression: ids and targets [D]."""
    rows = zip(encoded, targets, strict=True)
    return Dataset.from_list([{"input_ids": row.ids, "labels": list(target)} for row, target in rows])


@dataclass(frozen=True)
class WeightPadding:
    """Collates rows with a loss weight per token into right-padded tensors [B, T]; padding weighs nothing."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        weights = padded([row["weights"] for row in rows], 0.0)
        return padded_inputs([row["input_ids"] for row in rows], self.pad_token_id) | {"weights": weights}


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


def padded(rows: Sequence[Sequence[float]], value: float) -> torch.Tensor:
    """[B, T] with every row filled up at its right end; of integers where the rows hold integers."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
