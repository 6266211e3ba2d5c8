"""One pass over a prompt for all of its replies: most of what reward model, reference and policy read is prompt.

The eight or sixteen completions that GRPO samples for a prompt of a few hundred tokens have ten or a hundred each.

Letters: B replies, T tokens, C tokens of a completion, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from sotopia_rl.llm.prefill import can_prefill
from sotopia_rl.train.batches import padded_inputs

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of a reply to it."""


def last_states(
    read: Callable[..., torch.Tensor], pairs: Sequence[Pair], *, config: Any, device: torch.device
) -> torch.Tensor:
    """[B, H] hidden states of a decoder at each reply's last token.

    Each distinct prompt is read once, and its keys and values serve all of its replies: always two passes, because the
    processes of a sharded model must make equally many. Both parts are padded at their right ends; what pads a prompt
    is masked out when the replies are read, and positions are given, so that it is nothing to the model. A decoder
    whose layers are not plain attention reads prompt and reply in one.

    Args:
        read: The decoder: from its keyword arguments to its last layer's states [B, T, H].
        pairs: No prompt and no reply may be empty.
        config: The decoder's.
    """
    if not can_prefill(config):
        return whole_states(read, pairs, device=device)
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(tuple(prompt) for prompt, _ in pairs))}
    cache = DynamicCache(config=config)
    given = _padded(list(prompts), device)
    read(**given, past_key_values=cache, use_cache=True)
    owner_B = torch.tensor([prompts[tuple(prompt)] for prompt, _ in pairs], device=device)
    _spread(cache, owner_B)
    replies = [reply for _, reply in pairs]
    added = _padded(replies, device)
    start_B1 = given["attention_mask"].sum(-1, keepdim=True)[owner_B]
    states_BTH = read(
        input_ids=added["input_ids"],
        attention_mask=torch.cat([given["attention_mask"][owner_B], added["attention_mask"]], dim=1),
        position_ids=start_B1 + torch.arange(added["input_ids"].shape[1], device=device),
        past_key_values=cache,
        use_cache=True,
    )
    return _at_the_end(states_BTH, replies)


def whole_states(read: Callable[..., torch.Tensor], pairs: Sequence[Pair], *, device: torch.device) -> torch.Tensor:
    """As `last_states`, each prompt read with each of its replies: one pass, for pairs that share no prompt."""
    rows = [[*prompt, *reply] for prompt, reply in pairs]
    return _at_the_end(read(**_padded(rows, device), use_cache=False), rows)


def completion_logprobs(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, length: int, config: Any) -> Any:
    """Log-probabilities of completions, each distinct prompt read once; gradients flow through both parts.

    Args:
        model: A causal LM with TRL's fused head, as `GRPOTrainer` makes it, maybe wrapped by PEFT and DDP. Its layers
            must be plain attention, and gradient checkpointing, which lets no cache through, must be off.
        ids_BT: Prompts, padded on the left and of two tokens at least, and completions, padded on the right.
        mask_BT: 0 where padding stands.
        length: C, of the longest completion.

    Returns:
        TRL's output, with `log_probs` [B, C] and, where the head makes it, `entropy` [B, C].
    """
    split = ids_BT.shape[1] - length - 1  # a prompt's last token is read with the replies: it foretells their first
    marked = ids_BT.masked_fill(mask_BT == 0, -1)[:, :split]
    prompts, owner_B = torch.unique(marked, dim=0, return_inverse=True)
    given = (prompts >= 0).long()
    cache = DynamicCache(config=config)
    model(
        input_ids=prompts.clamp(min=0),
        attention_mask=given,
        position_ids=_positions(given),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    _spread(cache, owner_B)
    labels = ids_BT.masked_fill(mask_BT == 0, -100)[:, split:]
    labels[:, 0] = -100
    return model(
        input_ids=ids_BT[:, split:],
        attention_mask=mask_BT,
        position_ids=_positions(mask_BT)[:, split:],
        past_key_values=cache,
        labels=labels,
        fused_lm_head=True,
    )


def _spread(cache: DynamicCache, owner_B: torch.Tensor) -> None:
    """Give each reply its prompt's keys and values; on a CPU in an eighth of `batch_select_indices`' time."""
    for layer in cache.layers:
        layer.keys = layer.keys.index_select(0, owner_B)
        layer.values = layer.values.index_select(0, owner_B)


def _positions(mask_BT: torch.Tensor) -> torch.Tensor:
    return (mask_BT.cumsum(-1) - 1).clamp(min=0)


def _at_the_end(states_BTH: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    last_B = torch.tensor([len(row) - 1 for row in rows], device=states_BTH.device)
    return states_BTH[torch.arange(len(rows), device=states_BTH.device), last_B]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in padded_inputs(rows, 0).items()}  # masked out, so any token does
