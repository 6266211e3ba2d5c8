"""What a reward model is trained to make small, and the trainer that does it. Letters: B rows, D outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer

from sotopia_rl.train.conversations import ENDS, ROW_TOKENS


class RewardTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Minimises squared error plus `ranking_weight` times the pairs' shortfall, averaged over a batch.

    transformers would take the loss of a model whose forward accepts keyword arguments for a sum over all rows of
    a step: with accumulation or several processes it would be as many times too large.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, ranking_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranking_weight = ranking_weight

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch of ids, mask and labels [B, D]; or of conversations with the ends of B rows."""
        given = {name: tensor for name, tensor in inputs.items() if name not in {"labels", ENDS, ROW_TOKENS}}
        if ENDS in inputs:
            with every_score(model) as scores:
                outputs = model(**given)
            predicted_BD = scores[0][tuple(inputs[ENDS].T)].float()
        else:
            outputs = model(**given)
            predicted_BD = outputs.logits.float()
        loss = functional.mse_loss(predicted_BD, inputs["labels"])
        if self.ranking_weight:
            loss = loss + self.ranking_weight * ranking_loss(predicted_BD, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@contextmanager
def every_score(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The head's outputs [P, N, D], of which a sequence classifier's forward gives one for a row of the batch."""
    scores: list[torch.Tensor] = []
    heads = [module for name, module in model.named_modules() if name.endswith("score")]
    hook = heads[0].register_forward_hook(lambda _module, _inputs, output: scores.append(output))
    try:
        yield scores
    finally:
        hook.remove()


def ranking_loss(predicted_BD: torch.Tensor, targets_BD: torch.Tensor) -> torch.Tensor:
    """How far the pairs of a batch fall short of their order, on average over pairs and outputs.

    A pair whose targets differ by m should be at least m apart in its predictions, in the same direction; what it
    lacks counts. So perfect predictions cost nothing, a constant added to all of them changes nothing, and being
    further apart than the targets is free. Pairs with equal targets do not count; without any other, the loss is 0.
    """
    margin_BBD = targets_BD[:, None] - targets_BD[None]
    distance_BBD = predicted_BD[:, None] - predicted_BD[None]
    ordered_BBD = margin_BBD > 0
    lacking_BBD = functional.relu(margin_BBD - distance_BBD) * ordered_BBD
    return lacking_BBD.sum() / ordered_BBD.sum().clamp(min=1)
