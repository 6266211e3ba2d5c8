"""The first pass over the prompts of a batch, which with small models and short replies is most of the work.

Three things make it cheap. Equal prompts are read once. Prompts are read in chunks of like length, so that little
padding is computed. And the keys and values of recent prompts are kept: a conversation's next prompt repeats all of
the last one but its final lines, so only what is new is read. Reading in parts changes nothing but the last bits of a
float.

Axis letters: B rows, T tokens, H key-value heads, D head size, K twice the number of layers (keys and values of each).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 16
"""Prompts are compared in steps of so many tokens."""
CHUNK_TOKENS = 4096
"""Tokens read in one pass: the working set stays small."""

Tokens = Sequence[int]


@dataclass
class _Entry:
    """A prompt, its states [K, H, T, D], and the hashes under which it is found."""

    prompt: Tokens
    states: torch.Tensor
    keys: list[int]


class PrefixStore:
    """Keys and values of recent prompts, forgotten oldest first beyond `max_bytes`.

    One per base; `owner` names the adapter with which a prompt was read.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._by_block: dict[int, int] = {}
        self._bytes = 0
        self._count = 0

    def find(self, owner: str, prompt: Tokens) -> torch.Tensor | None:
        """[K, H, T, D] for the longest known beginning of `prompt`, always shorter than all of it."""
        for length, key in reversed(list(_blocks(owner, prompt, len(prompt) - 1))):
            number = self._by_block.get(key)
            if number is not None and list(self._entries[number].prompt[:length]) == list(prompt[:length]):
                self._entries.move_to_end(number)
                return self._entries[number].states[:, :, :length]
        return None

    def keep(self, owner: str, prompt: Tokens, states_KHTD: torch.Tensor) -> None:
        """Remember a prompt's states."""
        size = states_KHTD.nbytes
        if size > self.max_bytes:
            return
        while self._bytes + size > self.max_bytes:
            self._forget_oldest()
        keys = [key for _, key in _blocks(owner, prompt, len(prompt))]
        self._count += 1
        self._entries[self._count] = _Entry(prompt, states_KHTD, keys)
        self._by_block.update(dict.fromkeys(keys, self._count))
        self._bytes += size

    def _forget_oldest(self) -> None:
        number, entry = self._entries.popitem(last=False)
        self._bytes -= entry.states.nbytes
        for key in entry.keys:
            if self._by_block.get(key) == number:
                del self._by_block[key]


def _blocks(owner: str, prompt: Tokens, limit: int) -> Iterator[tuple[int, int]]:
    """(length, hash) of the beginnings of a prompt, in whole blocks, up to `limit` tokens."""
    key = hash(owner)
    for end in range(BLOCK, limit + 1, BLOCK):
        key = hash((key, tuple(prompt[end - BLOCK : end])))
        yield end, key


class _Slots(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values in room set aside beforehand: nothing is copied when a token is added."""

    def __init__(self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, filled: int) -> None:
        super().__init__()
        self.keys, self.values, self.filled = keys_BHTD, values_BHTD, filled
        self.dtype, self.device = keys_BHTD.dtype, keys_BHTD.device
        self.is_initialized = True

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.filled + keys.shape[-2]
        self.keys[:, :, self.filled : end] = keys
        self.values[:, :, self.filled : end] = values
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled


def can_prefill(config: Any) -> bool:
    """Whether every layer is plain full attention, which is what `prefill` knows how to take apart."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def prefill(
    model: Any, prompts: Sequence[Tokens], *, room: int, store: PrefixStore, owner: str
) -> tuple[torch.Tensor, DynamicCache]:
    """Read `prompts`.

    Args:
        room: Further tokens that the cache must hold per row.

    Returns:
        Logits [B, V] of each row's next token, and a left-padded cache whose rows end together.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(row)
    distinct = list(rows_of)
    known = [store.find(owner, prompt) for prompt in distinct]
    new = [len(prompt) - _length(states) for prompt, states in zip(distinct, known, strict=True)]
    longest = max(map(len, distinct))
    logits: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    whole: torch.Tensor | None = None
    for chunk in _chunks(new):
        logits_CV, states = _read_chunk(model, [distinct[i] for i in chunk], [known[i] for i in chunk])
        for place, i in enumerate(chunk):
            prompt_KHTD = states[place]
            store.keep(owner, distinct[i], prompt_KHTD)
            if whole is None:
                layers2, heads, _, size = prompt_KHTD.shape
                whole = prompt_KHTD.new_zeros(layers2, len(prompts), heads, longest + room, size)
            for row in rows_of[distinct[i]]:
                whole[:, row, :, longest - len(distinct[i]) : longest] = prompt_KHTD
                logits[row] = logits_CV[place]
    assert whole is not None, "no prompts"
    cache = DynamicCache(config=model.config)
    cache.layers = [_Slots(whole[k], whole[k + 1], longest) for k in range(0, len(whole), 2)]
    return torch.stack(logits), cache


def _length(states_KHTD: torch.Tensor | None) -> int:
    return 0 if states_KHTD is None else states_KHTD.shape[2]


def _chunks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped by like length, each group at most `CHUNK_TOKENS` with its padding."""
    chunk: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunk and (len(chunk) + 1) * lengths[index] > CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(index)
    yield chunk


def _read_chunk(
    model: Any, prompts: Sequence[Tokens], known: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [C, V] and each prompt's states [K, H, T, D], reading only what is not known.

    Columns: the known beginnings, right-aligned, then the new tokens, right-aligned. The gaps are masked out, and
    positions are given, so a gap is nothing to the model.
    """
    starts = [_length(states) for states in known]
    before, after = max(starts), max(len(p) - s for p, s in zip(prompts, starts, strict=True))
    ids = [[0] * (after - len(p) + s) + list(p[s:]) for p, s in zip(prompts, starts, strict=True)]
    mask = [
        [0] * (before - s) + [1] * s + [0] * (after - len(p) + s) + [1] * (len(p) - s)
        for p, s in zip(prompts, starts, strict=True)
    ]
    positions = [[0] * (after - len(p) + s) + list(range(s, len(p))) for p, s in zip(prompts, starts, strict=True)]
    device = model.device
    mask_CT = torch.tensor(mask, device=device)
    cache = DynamicCache(config=model.config)
    if before:
        cache = _with_known(model, known, before)
    output = model(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=mask_CT,
        position_ids=torch.tensor(positions, device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    states_KCHTD = torch.stack([part for layer in cache.layers for part in (layer.keys, layer.values)])
    rows = [states_KCHTD[:, i][:, :, mask_CT[i].bool()] for i in range(len(prompts))]
    return output.logits[:, -1].float(), rows


def _with_known(model: Any, known: Sequence[torch.Tensor | None], before: int) -> DynamicCache:
    """A cache that holds the known beginnings, right-aligned in `before` columns."""
    some = next(states for states in known if states is not None)
    layers2, heads, _, size = some.shape
    past_KCHTD = some.new_zeros(layers2, len(known), heads, before, size)
    for i, states in enumerate(known):
        if states is not None:
            past_KCHTD[:, i, :, before - states.shape[2] :] = states
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        layer.update(past_KCHTD[2 * index], past_KCHTD[2 * index + 1])
    return cache
