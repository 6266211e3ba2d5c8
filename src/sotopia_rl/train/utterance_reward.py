"""The reward of a reply: a gate for validity, then the reward model on the very ids that were sampled.

A reply that is no valid action, or that was cut off before its end token, gets `invalid_reward`, which is below
zero, for every output of the reward model. A valid one gets what the reward model says, and no less than zero. So
no reply, however much the reward model likes its text, is better for being unreadable. With the gate off every
reply gets what the reward model says.

TRL is given one reward function per output and combines their values; all share one pass through the model.
Letters: B replies, D outputs of the reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sotopia_rl.errors import ConfigError, TrainingError
from sotopia_rl.train.adapters import RewardScorer
from sotopia_rl.train.config import GRPOSettings

PROMPT_IDS = "policy_prompt_ids"
"""Column with the prompt's token ids; TRL keeps its own under `prompt_ids`."""


@dataclass
class UtteranceReward:
    """The rewards of replies, one per output of the reward model.

    Attributes:
        is_valid: Whether a reply's text is a valid action.
        leaks_secret: Whether a reply gives its speaker's secret away; (row number, text) to bool.
        latest: [B, D], what `score` found last.
    """

    scorer: RewardScorer
    is_valid: Callable[[str], bool]
    settings: GRPOSettings
    eos_token_id: int
    leaks_secret: Callable[[int, str], bool] | None = None
    latest: list[list[float]] = field(default_factory=list)

    def score(
        self,
        *,
        completions: Sequence[Sequence[dict[str, str]]],
        completion_ids: Sequence[list[int]],
        row_number: Sequence[int],
        log_metric: Callable[[str, float], None],
        **columns: Any,
    ) -> list[list[float]]:
        """[B, D] rewards.

        Raises:
            TrainingError: The reward model gives something that is no number.
        """
        prompts = columns[PROMPT_IDS]
        texts = [completion[0]["content"] for completion in completions]
        ended = [bool(ids) and ids[-1] == self.eos_token_id for ids in completion_ids]
        valid = [whole and self.is_valid(text) for whole, text in zip(ended, texts, strict=True)]
        scores_BD = self.scorer.score(list(zip(prompts, completion_ids, strict=True)))
        if not torch.isfinite(scores_BD).all():
            raise TrainingError("the reward model gives no numbers (NaN); its weights or the base are broken")
        log_metric("validity", sum(valid) / len(valid))
        log_metric("reward_model_score", scores_BD.mean().item())
        if self.leaks_secret is not None:
            leaks = [self.leaks_secret(row, text) for row, text in zip(row_number, texts, strict=True)]
            log_metric("secret_leaks", sum(leaks) / len(leaks))
        if self.settings.validity_gate:
            valid_B1 = torch.tensor(valid)[:, None]
            scores_BD = torch.where(valid_B1, scores_BD.clamp(min=0), self.settings.invalid_reward)
        self.latest = scores_BD.tolist()
        return self.latest

    def functions(self) -> list[OutputReward]:
        """One reward function per output, in order. The first one called for a batch must be the first one here."""
        return [OutputReward(self, place, name) for place, name in enumerate(self.scorer.outputs)]

    def weights(self) -> list[float]:
        """[D] weights of the outputs, which add up to 1.

        Raises:
            ConfigError: A weight is given for an output that the reward model lacks, or all are 0.
        """
        return output_weights(self.scorer.outputs, self.settings.dimension_weights)


@dataclass
class OutputReward:
    """One output of the reward as a function for TRL, which names its curve after it."""

    reward: UtteranceReward
    place: int
    __name__: str

    def __call__(self, **given: Any) -> list[float]:
        """[B] rewards; the first output's function has all of them computed."""
        rewards_BD = self.reward.score(**given) if self.place == 0 else self.reward.latest
        return [row[self.place] for row in rewards_BD]


def output_weights(outputs: Sequence[str], given: Mapping[str, float]) -> list[float]:
    """[D] weights of the outputs, which add up to 1; one that is not given weighs as much as 1.

    Raises:
        ConfigError: A weight is given for an output that is not there, or all are 0.
    """
    if unknown := [name for name in given if name not in outputs]:
        raise ConfigError(f"dimension_weights: the reward model has no {', '.join(unknown)}, only {', '.join(outputs)}")
    weights = [given.get(name, 1.0) for name in outputs]
    if not sum(weights):
        raise ConfigError("dimension_weights: all are 0, so there is no reward")
    return [weight / sum(weights) for weight in weights]
