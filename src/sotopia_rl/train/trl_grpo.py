"""The one module that leans on the inside of TRL's GRPOTrainer. `tests/test_train_trl_contract.py` pins it.

What is relied on beyond TRL's documented interface (1.16):
- a PeftModel with an adapter `default` and beta above zero gets a frozen copy of it named `ref`, and the
  reference is the base without adapters where no `ref` is there;
- further columns of a row reach the reward function, one value per completion, and so do `completion_ids`;
- `log_metric` averages what it is given into the next line of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from sotopia_rl.train.adapters import REFERENCE, RewardScorer
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.data import Encoded
from sotopia_rl.train.folder import RunFolder
from sotopia_rl.train.loading import trainer_arguments

PROMPT_IDS = "policy_prompt_ids"
"""Column with the prompt's token ids; TRL keeps its own under `prompt_ids`."""

METRIC_NAMES: dict[str, str | None] = {
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut_off",
    "completions/min_length": None,
    "completions/max_length": None,
    "completions/mean_terminated_length": None,
    "completions/min_terminated_length": None,
    "completions/max_terminated_length": None,
    "frac_reward_zero_std": "groups_without_signal",
    "rewards/utterance_reward/mean": None,
    "rewards/utterance_reward/std": None,
    "clip_ratio/low_mean": None,
    "clip_ratio/low_min": None,
    "clip_ratio/high_mean": None,
    "clip_ratio/high_max": None,
    "clip_ratio/region_mean": "clip_ratio",
    "step_time": "seconds",
}


class PolicyTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped here
    """GRPOTrainer with a choice of reference policy, and without a model card in every checkpoint."""

    def __init__(self, *args: Any, reference_is_base: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if reference_is_base and REFERENCE in self.model.peft_config:
            self.model.delete_adapter(REFERENCE)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Cards are written once, beside the result."""


@dataclass
class UtteranceReward:
    """The reward function: a gate for validity, then the reward model on the very ids that were sampled.

    A reply that is no valid action, or that was cut off before its end token, gets `invalid_reward`, which is
    below zero. A valid one gets the mean over the reward model's outputs, and no less than zero. So no reply,
    however much the reward model likes its text, is better for being unreadable. With the gate off every
    reply gets what the reward model says.

    Attributes:
        is_valid: Whether a reply's text is a valid action.
        leaks_secret: Whether a reply gives its speaker's secret away; (row number, text) to bool.
    """

    scorer: RewardScorer
    is_valid: Callable[[str], bool]
    settings: GRPOSettings
    eos_token_id: int
    leaks_secret: Callable[[int, str], bool] | None = None
    __name__ = "utterance_reward"

    def __call__(
        self,
        *,
        completions: Sequence[Sequence[dict[str, str]]],
        completion_ids: Sequence[list[int]],
        row_number: Sequence[int],
        log_metric: Callable[[str, float], None],
        **columns: Any,
    ) -> list[float]:
        """One reward per completion."""
        prompts = columns[PROMPT_IDS]
        texts = [completion[0]["content"] for completion in completions]
        ended = [bool(ids) and ids[-1] == self.eos_token_id for ids in completion_ids]
        valid = [whole and self.is_valid(text) for whole, text in zip(ended, texts, strict=True)]
        sequences = [[*prompt, *ids] for prompt, ids in zip(prompts, completion_ids, strict=True)]
        scores = self.scorer.score(sequences).mean(dim=1).tolist()
        log_metric("validity", sum(valid) / len(valid))
        log_metric("reward_model_score", sum(scores) / len(scores))
        if self.leaks_secret is not None:
            leaks = [self.leaks_secret(row, text) for row, text in zip(row_number, texts, strict=True)]
            log_metric("secret_leaks", sum(leaks) / len(leaks))
        if not self.settings.validity_gate:
            return list(scores)
        return [
            max(score, 0.0) if fine else self.settings.invalid_reward for score, fine in zip(scores, valid, strict=True)
        ]


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: UtteranceReward,
    settings: GRPOSettings,
    run: RunFolder,
    *,
    prompts: Sequence[Encoded],
) -> PolicyTrainer:
    """The trainer that our settings describe."""
    completions = settings.prompts_per_step * settings.num_generations
    arguments = trainer_arguments(settings, run, evaluate=False) | {
        "gradient_accumulation_steps": completions // settings.batch_size
    }
    return PolicyTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            **arguments,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            beta=settings.beta,
            loss_type=settings.loss_type,
            scale_rewards=settings.scale_rewards,
            disable_dropout=True,
        ),
        train_dataset=prompt_rows(prompts),
        processing_class=tokenizer,
        reference_is_base=settings.ref == "base",
    )


def prompt_rows(prompts: Sequence[Encoded]) -> Dataset:
    """Rows for the trainer: messages, their token ids, and the number of the row."""
    return Dataset.from_list(
        [
            {
                "prompt": [message.model_dump() for message in prompt.messages],
                PROMPT_IDS: prompt.prompt_ids,
                "row_number": number,
            }
            for number, prompt in enumerate(prompts)
        ]
    )
