"""Settings of the training stages. No torch here: the command line and the experiment file import this.

One frozen class per stage, flat. Each field is mapped once onto the option of TRL, transformers or PEFT
that it stands for; an option that is not here is not exposed.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sotopia_rl.config import Config


class TrainerSettings(Config):
    """What every training stage has."""

    seed: int = Field(default=0, ge=0)
    """Of the initial weights, the order of the data and sampling."""
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto")
    """`auto` takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto")
    """Of the frozen weights and the arithmetic; `auto` is float32 on the CPU and bfloat16 on a GPU."""
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(default="cosine")
    """How the learning rate goes down after the warm-up."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are shortened to it."""
    max_steps: int = Field(default=500, gt=0)
    """Optimizer steps; the rows are gone through as often as that takes."""
    batch_size: int = Field(default=8, gt=0)
    """Rows per forward pass on each device."""
    save_every: int = Field(default=100, gt=0)
    """Steps between checkpoints; a killed run goes on from the last one."""


class TinyModelSettings(TrainerSettings):
    """A causal language model small enough to be made on the spot, tokenizer included."""

    learning_rate: float = Field(default=4e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_steps: int = Field(default=700, gt=0)
    batch_size: int = Field(default=16, gt=0)
    save_every: int = Field(default=200, gt=0)
    prompt_weight: float = Field(default=0.1, ge=0)
    """Loss weight of a prompt's tokens; a reply's weigh 1."""
    vocabulary: int = Field(default=1024, ge=300)
    """Tokens at most, the 256 bytes and the special tokens included."""
    hidden_size: int = Field(default=96, gt=0)
    layers: int = Field(default=3, gt=0)
    heads: int = Field(default=4, gt=0)
    key_value_heads: int = Field(default=2, gt=0)
    mlp_size: int = Field(default=256, gt=0)
    max_length: int = Field(default=512, gt=0)
    """Longest row in tokens; older turns of longer rows are left out."""
    context_length: int = Field(default=1024, gt=0)
    """Positions the model declares."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.hidden_size % self.heads or self.heads % self.key_value_heads:
            raise ValueError("hidden_size must be divisible by heads, and heads by key_value_heads")
        if self.max_length > self.context_length:
            raise ValueError(f"max_length {self.max_length} is above context_length {self.context_length}")
        return self


class AdapterSettings(TrainerSettings):
    """What the stages that train a new adapter have."""

    accumulation: int = Field(default=1, gt=0)
    """Forward passes per optimizer step."""
    max_length: int = Field(default=4096, gt=0)
    """Longest row in tokens, answer included; a longer one loses its oldest turns."""
    held_out_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the episodes kept out of training, for the held-out loss."""
    eval_every: int = Field(default=50, gt=0)
    """Steps between evaluations on the held-out rows."""
    keep: Literal["best", "last"] = Field(default="best")
    """Which weights are the result: those with the lowest held-out loss, or the last ones."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many evaluations without a lower held-out loss; None never stops early."""
    quantise: Literal["none", "nf4"] = Field(default="none")
    """`nf4` loads the frozen base in four bits (QLoRA, needs bitsandbytes)."""
    gradient_checkpointing: bool = Field(default=False)
    """Recompute activations in the backward pass: less memory, more time."""
    lora_r: int = Field(default=8, gt=0)
    """Rank of the adapter."""
    lora_alpha: float = Field(default=16, gt=0)
    """The adapter's output is scaled by alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: tuple[str, ...] = Field(default=(), max_length=64)
    """Names of the adapted linear layers; empty means all of them but the output layer."""


class SFTSettings(AdapterSettings):
    """Supervised fine-tuning on (prompt, reply) rows, loss on the reply only."""

    tuning: Literal["lora", "full"] = Field(default="lora")
    """`full` trains every weight and writes a whole model instead of an adapter."""

    @model_validator(mode="after")
    def _full_is_not_quantised(self) -> Self:
        if self.tuning == "full" and self.quantise != "none":
            raise ValueError("full fine-tuning cannot train quantised weights; use tuning: lora")
        return self


class RewardModelSettings(AdapterSettings):
    """A regression on utterance rewards: an adapter and a linear head on the last token."""

    learning_rate: float = Field(default=4e-5, gt=0)
    dimensions: tuple[str, ...] = Field(default=())
    """Dimensions with an output of their own; empty means one output, the combined value."""


class GRPOSettings(TrainerSettings):
    """GRPO from the SFT adapter, rewarded by the reward adapter on the same frozen base."""

    learning_rate: float = Field(default=5e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant")
    max_steps: int = Field(default=200, gt=0)
    batch_size: int = Field(default=16, gt=0)
    """Completions per forward and backward pass on each device."""
    save_every: int = Field(default=25, gt=0)
    eval_every: int = Field(default=25, gt=0)
    """Steps between calls of the held-out judge, where one is given."""
    prompts_per_step: int = Field(default=8, gt=0)
    num_generations: int = Field(default=8, ge=2)
    """Completions per prompt: the group that advantages are relative to."""
    max_prompt_length: int = Field(default=4096, gt=0)
    """Longest prompt in tokens; a longer one loses its oldest turns."""
    max_completion_length: int = Field(default=128, gt=0)
    """Longest reply in tokens; a reply that is cut off counts as invalid."""
    temperature: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.02, ge=0)
    """Weight of the KL divergence from the reference policy."""
    ref: Literal["sft", "base"] = Field(default="sft")
    """The reference policy; `base`, without any adapter, is what the paper's library did."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = Field(default="dapo")
    """How token losses are averaged, as in TRL."""
    scale_rewards: Literal["group", "batch", "none"] = Field(default="group")
    """Whose standard deviation advantages are divided by."""
    validity_gate: bool = Field(default=True)
    """Give a reply that is no valid action `invalid_reward` instead of the reward model's score."""
    invalid_reward: float = Field(default=-0.5, lt=0)
    """Reward of an invalid reply. Valid ones are scored at 0 or more, so it is always the lowest."""
    gate_min_spearman: float | None = Field(default=0.3, ge=-1, le=1)
    """Refuse a reward model whose held-out rank correlation is lower; None switches the gate off."""
    on_collapse: Literal["ignore", "warn", "stop"] = Field(default="stop")
    """What to do when entropy or validity stays below its minimum for 5 steps in a row."""
    min_entropy: float = Field(default=0.01, ge=0)
    """In nats per token."""
    min_validity: float = Field(default=0.3, ge=0, le=1)
    keep: Literal["best", "last"] = Field(default="last")
    """Which weights are the result: those with the best judge score (or reward), or the last ones."""
    quantise: Literal["none", "nf4"] = Field(default="none")
    """`nf4` loads the frozen base in four bits; must be what SFT and the reward model used."""
    gradient_checkpointing: bool = Field(default=False)
    """Recompute activations in the backward pass: less memory, more time."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        completions = self.prompts_per_step * self.num_generations
        if completions % self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must divide prompts_per_step x num_generations ({completions})"
            )
        return self
