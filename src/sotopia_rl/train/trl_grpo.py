"""The one module that leans on the inside of TRL's GRPOTrainer. `tests/test_train_trl_contract.py` pins it.

What is relied on beyond TRL's documented interface (1.16):
- a PeftModel with an adapter `default` and beta above zero gets a frozen copy of it named `ref`, and the
  reference is the base without adapters where no `ref` is there;
- further columns of a row reach the reward functions, one value per completion, and so do `completion_ids`;
- the reward functions are called in order, each with the whole batch, and their values are weighted and added up,
  before or after each is normalised within its group;
- `log_metric` averages what it is given into the next line of the log;
- without vLLM, completions come from `_generate_single_turn(prompt_ids, ...)`, one per prompt, end token included,
  with no log-probabilities beside them;
- what is sampled is weighed by `_get_per_token_logps_and_entropies`, for the policy, its past self and the reference,
  through the model's head with `fused_lm_head`;
- with vLLM, completions come from `vllm_generation`, by `sync_weights()` once per step and `generate(prompts, images,
  num_generations, profiler)`, where `use_vllm` is true, and the loss is then corrected by the importance ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from sotopia_rl.errors import ConfigError, RolloutError
from sotopia_rl.llm.prefill import can_prefill
from sotopia_rl.train.adapters import REFERENCE
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.data import Encoded
from sotopia_rl.train.folder import RunFolder
from sotopia_rl.train.loading import trainer_arguments
from sotopia_rl.train.processes import count, weights_are_divided
from sotopia_rl.train.prompt_once import completion_logprobs
from sotopia_rl.train.rollout import (
    ColocatedRollouts,
    PublishedPolicies,
    ServerRollouts,
    rollout_arguments,
    sample_here,
)
from sotopia_rl.train.utterance_reward import PROMPT_IDS, UtteranceReward
from sotopia_rl.train.vllm_servers import VLLMServers

AGGREGATIONS = {"rewards": "sum_then_normalize", "advantages": "normalize_then_sum"}

METRIC_NAMES: dict[str, str | None] = {
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut_off",
    "completions/min_length": None,
    "completions/max_length": None,
    "completions/mean_terminated_length": None,
    "completions/min_terminated_length": None,
    "completions/max_terminated_length": None,
    "frac_reward_zero_std": "groups_without_signal",
    "clip_ratio/low_mean": None,
    "clip_ratio/low_min": None,
    "clip_ratio/high_mean": None,
    "clip_ratio/high_max": None,
    "clip_ratio/region_mean": "clip_ratio",
    "step_time": "seconds",
    "sampling/sampling_logp_difference/mean": "logprob_gap",
    "sampling/sampling_logp_difference/max": "logprob_gap_max",
    "sampling/importance_sampling_ratio/mean": "importance_mean",
    "sampling/importance_sampling_ratio/min": "importance_min",
    "sampling/importance_sampling_ratio/max": "importance_max",
}
GAP = "sampling/sampling_logp_difference/mean"


def metric_names(outputs: Sequence[str]) -> dict[str, str | None]:
    """Our names for TRL's metrics, those of the reward model's outputs among them; None leaves one out."""
    named: dict[str, str | None] = {}
    for output in outputs:
        alone = len(outputs) == 1  # then it is the reward, which has its curve already
        named[f"rewards/{output}/mean"] = None if alone else f"reward_{output}"
        named[f"rewards/{output}/std"] = None if alone else f"reward_{output}_std"
    return METRIC_NAMES | named


class PolicyTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped here
    """GRPOTrainer with a choice of reference policy and of what samples, and without a card in every checkpoint."""

    use_vllm: bool
    vllm_generation: Any
    eos_token_ids: Any
    max_completion_length: int
    temperature: float
    control: Any

    def __init__(
        self, *args: Any, reference_is_base: bool = False, max_logprob_gap: float | None = None, **kwargs: Any
    ) -> None:
        self.max_logprob_gap = max_logprob_gap
        super().__init__(*args, **kwargs)
        if reference_is_base and REFERENCE in self.model.peft_config:
            self.model.delete_adapter(REFERENCE)
        if self.use_vllm:
            self.vllm_generation = ColocatedRollouts(self.vllm_generation, self.model, self.report)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Cards are written once, beside the result."""

    def sample_from(self, servers: VLLMServers, published: PublishedPolicies, sync_every: int) -> None:
        """Take completions from servers instead of generating them here."""
        self.vllm_generation = ServerRollouts(
            model=self.model,
            accelerator=self.accelerator,
            servers=servers,
            published=published,
            step=lambda: int(self.state.global_step),
            sync_every=sync_every,
            report=self.report,
        )
        self.use_vllm, self.vllm_mode, self._last_loaded_step = True, "server", -1

    def _can_read_prompts_once(self) -> bool:
        return not weights_are_divided() and can_prefill(self.model.config)

    def _generate_single_turn(self, prompt_ids: Any, *others: Any, **named: Any) -> tuple[list[list[int]], Any]:
        """As TRL's; but where the model samples for itself, whole and of a plain kind, its prompts are read once."""
        if self.use_vllm or not self._can_read_prompts_once():
            found: tuple[list[list[int]], Any] = super()._generate_single_turn(prompt_ids, *others, **named)
            return found
        sampled = sample_here(
            self.model,
            prompt_ids,
            stop_tokens=set(self.eos_token_ids),
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
        )
        return sampled, None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **pictures: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As TRL's, in the loss too, but a prompt is read once for all of its completions where the model allows it."""
        checkpointing = torch.is_grad_enabled() and self.args.gradient_checkpointing
        if checkpointing or compute_aux_loss or not self._can_read_prompts_once():
            found: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
            found = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **pictures,
            )
            return found
        outputs, size = [], batch_size or len(input_ids)
        for start in range(0, len(input_ids), size):
            part = slice(start, start + size)
            with self.accelerator.autocast():
                outputs.append(
                    completion_logprobs(model, input_ids[part], attention_mask[part], logits_to_keep, self.model.config)
                )
        logps = torch.cat([output.log_probs for output in outputs])
        return logps, torch.cat([output.entropy for output in outputs]) if compute_entropy else None, None

    def report(self, name: str, value: float) -> None:
        """Add a value to the present step's line of the log."""
        self._metrics["train"][name].append(value)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; where the rollouts fail, what has been trained is saved first, to be resumed."""
        try:
            result = super().train(*args, **kwargs)
        except RolloutError:
            step = self.state.global_step
            if step and not (Path(self.args.output_dir) / f"checkpoint-{step}").is_dir():
                self._save_checkpoint(self.model, trial=None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise
        if self.use_vllm and isinstance(self.vllm_generation, ServerRollouts):
            self.vllm_generation.close()
        return result

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """As TRL's; and sampler and trainer must agree about how likely what was sampled is."""
        output = super()._generate_and_score_completions(inputs)
        gaps = self._metrics["train"].get(GAP)  # the same in every process
        if self.max_logprob_gap is not None and gaps and not gaps[-1] <= self.max_logprob_gap:
            raise RolloutError(
                f"step {self.state.global_step + 1}: vLLM's log-probabilities differ from the trainer's by "
                f"{gaps[-1]:.3g} nats per token on average, more than vllm_max_logprob_gap {self.max_logprob_gap:g}: "
                "it serves another base, other weights or a coarser dtype"
            )
        return output


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: UtteranceReward,
    settings: GRPOSettings,
    run: RunFolder,
    *,
    prompts: Sequence[Encoded],
    servers: VLLMServers | None = None,
) -> PolicyTrainer:
    """The trainer that our settings describe."""
    arguments = trainer_arguments(settings, run, evaluate=False) | {
        "gradient_accumulation_steps": passes_per_step(settings)
    }
    trainer = PolicyTrainer(
        model=model,
        reward_funcs=reward.functions(),
        args=GRPOConfig(
            **arguments,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            beta=settings.beta,
            loss_type=settings.loss_type,
            scale_rewards=settings.scale_rewards,
            reward_weights=reward.weights(),
            multi_objective_aggregation=AGGREGATIONS[settings.combine],
            disable_dropout=True,
            **rollout_arguments(settings),
        ),
        train_dataset=prompt_rows(prompts),
        processing_class=tokenizer,
        reference_is_base=settings.ref == "base",
        max_logprob_gap=settings.vllm_max_logprob_gap,
    )
    if servers is not None:
        trainer.sample_from(servers, PublishedPolicies.of(settings, run), settings.vllm_sync_every)
    return trainer


def passes_per_step(settings: GRPOSettings) -> int:
    """Forward and backward passes of each process per optimizer step.

    Raises:
        ConfigError: The completions of a step cannot be divided evenly among the processes.
    """
    completions, share = settings.prompts_per_step * settings.num_generations, settings.batch_size * count()
    if completions % share:
        raise ConfigError(
            f"prompts_per_step x num_generations ({completions}) must be a multiple of batch_size x processes "
            f"({settings.batch_size} x {count()})"
        )
    return completions // share


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
