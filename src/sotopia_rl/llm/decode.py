"""Batched decoding of a causal language model: many requests, one forward pass per token.

A lean loop of its own instead of `model.generate`, for three reasons: every row has its own temperature, top-p,
limit and random stream; a finished row is handed over at once and leaves the batch; and with the models of a few
million parameters that play thousands of short turns here, `generate` spends most of its time outside the model.

A row's tokens do not depend on which rows share its batch (up to floating point: left padding is masked out):
each is drawn with one uniform number from the row's own stream, by inverting the cumulative distribution.

Axis letters: B rows of the batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from transformers import DynamicCache

from sotopia_rl.llm.prefill import PrefixStore, prefill

# A float32 uniform of exactly 1 would fall off the end of the distribution.
_BELOW_ONE = 1 - 2**-20


class Constraint(Protocol):
    """What restricts a row's next token (see `constraint.py`)."""

    def fill(self, allowed_bits: torch.Tensor, index: int) -> None:
        """Write the allowed tokens into row `index` of [B, ceil(V / 32)] int32."""

    def accept(self, token: int) -> bool:
        """Move on by `token`; True when nothing more may follow."""


@dataclass
class Row:
    """One request: what it asks, and the tokens it has so far."""

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    stream: random.Random
    constraint: Constraint | None = None
    tokens: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    stop_token: int | None = None
    """What ended it, where a stop token did."""

    def take(self, token: int, stop_tokens: Collection[int]) -> None:
        """Add a token and see whether the reply is over; a stop token is not part of the reply."""
        if token in stop_tokens:
            self.finish, self.stop_token = "stop", token
            return
        self.tokens.append(token)
        if self.constraint is not None and self.constraint.accept(token):
            self.finish = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish = "length"


@torch.inference_mode()
def decode(
    model: Any,
    rows: Sequence[Row],
    *,
    pad_token: int,
    stop_tokens: Collection[int],
    done: Callable[[Row], None],
    wanted: Callable[[Row], bool] = lambda _: True,
    store: PrefixStore | None = None,
    owner: str = "",
) -> None:
    """Decode `rows` together; `done` is called with each row as it finishes, `tokens` and `finish` set.

    Args:
        model: A transformers causal LM or a PEFT model around one, in eval mode.
        store: Prompts read before, by the same weights; None for models that `can_prefill` refuses.
        wanted: Asked at every token; a row that nobody waits for any more is dropped.
        owner: The adapter that is active, for `store`.
    """
    live = list(rows)
    ids_BT, mask_BT = _left_padded(live, pad_token, model.device)
    next_B = mask_BT.sum(-1)  # position of each row's next token
    if store is None:
        cache = DynamicCache(config=model.config)
        logits_BV = _forward(model, ids_BT, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0), cache)
    else:
        room = max(row.max_new_tokens for row in live)
        logits_BV, cache = prefill(model, [row.prompt for row in live], room=room, store=store, owner=owner)
    sampler = _Sampler(live, model.device)
    while True:
        tokens = sampler.choose(logits_BV)
        for row, token in zip(live, tokens, strict=True):
            if row.finish is None:
                row.take(token, stop_tokens)
                if row.finish is not None:
                    done(row)
                elif not wanted(row):
                    row.finish = "stop"
        keep = [index for index, row in enumerate(live) if row.finish is None]
        if not keep:
            return
        if len(keep) <= 0.75 * len(live):  # copying the cache is worth it
            live, tokens = [live[i] for i in keep], [tokens[i] for i in keep]
            keep_K = torch.tensor(keep, device=model.device)
            cache.batch_select_indices(keep_K)
            mask_BT, next_B = mask_BT[keep_K], next_B[keep_K]
            sampler = _Sampler(live, model.device)
        ids_B1 = torch.tensor(tokens, device=model.device)[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(live), 1)], dim=1)
        logits_BV = _forward(model, ids_B1, mask_BT, next_B[:, None], cache)
        next_B = next_B + 1


def _left_padded(rows: Sequence[Row], pad_token: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row.prompt) for row in rows)
    ids = [[pad_token] * (longest - len(row.prompt)) + list(row.prompt) for row in rows]
    mask = [[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _forward(
    model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, positions_BT: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """Next-token logits [B, V] in float32; `cache` grows by the tokens given."""
    output = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits[:, -1].float()
    return logits


class _Sampler:
    """Chooses one token per row, each by its own settings and its own random stream."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows = rows
        self.device = device
        self.greedy = all(row.temperature == 0 for row in rows)
        self.greedy_B = torch.tensor([row.temperature == 0 for row in rows], device=device)
        self.temperature_B1 = torch.tensor([row.temperature or 1.0 for row in rows], device=device)[:, None]
        self.top_p_B1 = torch.tensor([row.top_p for row in rows], device=device)[:, None]
        self.nucleus = any(row.top_p < 1 for row in rows)
        self.constrained = any(row.constraint is not None for row in rows)

    def choose(self, logits_BV: torch.Tensor) -> list[int]:
        if self.constrained:
            self._mask(logits_BV)
        best_B = logits_BV.argmax(-1)
        if not self.greedy:
            best_B = torch.where(self.greedy_B, best_B, self._sampled(logits_BV))
        chosen: list[int] = best_B.tolist()
        return chosen

    def _sampled(self, logits_BV: torch.Tensor) -> torch.Tensor:
        probability_BV = torch.softmax(logits_BV / self.temperature_B1, dim=-1)
        # Drawn for greedy and finished rows too: a row's stream advances by one per token whoever is beside it.
        uniforms = [min(row.stream.random(), _BELOW_ONE) for row in self.rows]
        uniform_B1 = torch.tensor(uniforms, device=self.device)[:, None]
        if not self.nucleus:
            return _invert(probability_BV, uniform_B1)
        sorted_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        # The likeliest tokens whose mass first reaches top_p; a row with top_p 1 keeps all.
        outside_BV = (before_BV >= self.top_p_B1) & (self.top_p_B1 < 1)
        outside_BV[:, 0] = False
        sorted_BV = sorted_BV.masked_fill(outside_BV, 0.0)
        return order_BV.gather(1, _invert(sorted_BV, uniform_B1)[:, None])[:, 0]

    def _mask(self, logits_BV: torch.Tensor) -> None:
        import xgrammar

        bits = torch.full((len(self.rows), (logits_BV.shape[1] + 31) // 32), -1, dtype=torch.int32)
        for index, row in enumerate(self.rows):
            if row.constraint is not None and row.finish is None:
                row.constraint.fill(bits, index)
        xgrammar.apply_token_bitmask_inplace(logits_BV, bits.to(self.device))


def _invert(mass_BV: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """[B] the first index at which the cumulative mass exceeds `uniform` of the whole."""
    cumulative_BV = mass_BV.cumsum(-1)
    index_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    return index_B1[:, 0].clamp(max=mass_BV.shape[1] - 1)
