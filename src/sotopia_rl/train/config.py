"""Settings of the training stages. No torch here: the command line and the experiment file import this.

One frozen class per stage, flat. Each field is mapped once onto the option of TRL, transformers or PEFT
that it stands for; an option that is not here is not exposed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from sotopia_rl.config import Config

TrackerName = Literal["wandb", "trackio", "tensorboard"]


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
    num_epochs: float | None = Field(default=None, gt=0)
    """Times to go through the rows; where given, it decides the number of steps instead of `max_steps`."""
    batch_size: int = Field(default=8, gt=0)
    """Rows per forward pass on each device."""
    save_every: int = Field(default=100, gt=0)
    """Steps between checkpoints; a killed run goes on from the last one."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(default="auto")
    """Implementation of attention; `auto` is transformers' choice, `flash_attention_2` needs flash-attn and a GPU."""
    trackers: tuple[TrackerName, ...] = Field(default=())
    """Where metrics go besides metrics.jsonl; changing it does not keep a run from being resumed."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository (`owner/name`) on the hub that the result is uploaded to, private unless it exists already."""


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
    template_path: Path | None = Field(default=None)
    """Jinja file with the chat template to use instead of the tokenizer's own; it is saved with the adapter."""
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
    packing: Literal["none", "packed", "padding_free", "conversation"] = Field(default="none")
    """`packed` puts short rows together into rows of up to `max_length` tokens, each attending to itself alone;
    `padding_free` joins the rows of a batch instead of padding them to the longest; `conversation` reads the rows of
    one conversation together, what their prompts share once, and counts conversations in `batch_size`. All give the
    padded loss."""

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
    loss: Literal["mse", "mse_ranking"] = Field(default="mse")
    """`mse_ranking` adds what pairs of a batch lack in distance: a hinge whose margin is the targets' difference."""
    packing: Literal["none", "conversation"] = Field(default="none")
    """`conversation` reads the rows of one conversation together, what their prompts share once, and counts
    conversations in `batch_size`."""
    ranking_weight: float = Field(default=1.0, gt=0)
    """Weight of the pairs in `mse_ranking`; the squared error weighs 1."""

    @model_validator(mode="after")
    def _pairs_need_two(self) -> Self:
        if self.loss == "mse_ranking" and self.packing == "none" and self.batch_size < 2:
            raise ValueError("loss: mse_ranking compares the rows of a batch; batch_size must be 2 or more")
        return self


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
    template_path: Path | None = Field(default=None)
    """Jinja file with the chat template; by default the one that was saved with the SFT adapter."""
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
    combine: Literal["rewards", "advantages"] = Field(default="rewards")
    """For a reward model with several outputs: `rewards` averages them, then compares within the group;
    `advantages` compares each within the group first, then adds up, so that none drowns in another's spread."""
    dimension_weights: dict[str, float] = Field(default={})
    """Weights by name of output; one left out weighs 1."""
    validity_gate: bool = Field(default=True)
    """Give a reply that is no valid action `invalid_reward` instead of the reward model's score."""
    invalid_reward: float = Field(default=-0.5, lt=0)
    """Reward of an invalid reply. Valid ones are scored at 0 or more, so it is always the lowest."""
    gate_min_spearman: float | None = Field(default=0.3, ge=-1, le=1)
    """Refuse a reward model whose held-out rank correlation is lower; None switches the gate off."""
    on_collapse: Literal["ignore", "warn", "stop"] = Field(default="stop")
    """What to do when for 5 steps in a row entropy or validity is below its minimum, or all rewards are equal."""
    min_entropy: float = Field(default=0.01, ge=0)
    """In nats per token."""
    min_validity: float = Field(default=0.3, ge=0, le=1)
    keep: Literal["best", "last"] = Field(default="last")
    """Which weights are the result: those with the best judge score (or reward), or the last ones."""
    quantise: Literal["none", "nf4"] = Field(default="none")
    """`nf4` loads the frozen base in four bits; must be what SFT and the reward model used."""
    gradient_checkpointing: bool = Field(default=False)
    """Recompute activations in the backward pass: less memory, more time."""
    rollouts: Literal["in_process", "vllm_colocate", "vllm_server"] = Field(default="in_process")
    """What samples the completions: the trainer itself, vLLM in its process, or vLLM servers."""
    vllm_urls: tuple[str, ...] = Field(default=())
    """Addresses of the servers, which share the prompts; each serves the base and takes adapters at run time."""
    vllm_adapter_folder: Path | None = Field(default=None)
    """Folder that the servers can read too, for the policy's adapter; `served` in the run folder by default."""
    vllm_sync_every: int = Field(default=1, gt=0)
    """Optimizer steps between two versions of the policy on the servers."""
    vllm_timeout_seconds: float = Field(default=600.0, gt=0)
    """Deadline of one request to a server: one prompt with all its completions."""
    vllm_retries: int = Field(default=3, ge=0)
    """Further attempts at a request that failed; then the run stops, with what it has trained saved."""
    vllm_importance: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        default="token_truncate"
    )
    """How the loss is corrected for the difference between vLLM's probabilities and the trainer's: the ratio of
    each token (or whole reply), cut at `vllm_importance_cap`, or replies above it left out."""
    vllm_importance_cap: float = Field(default=3.0, gt=1)
    """Largest ratio."""
    vllm_max_logprob_gap: float | None = Field(default=0.5, gt=0)
    """Stop where vLLM's log-probabilities and the trainer's differ by more nats per token: it is not the same policy
    that they look at. None never stops; with `vllm_importance: none` the difference is not known."""
    vllm_memory_share: float = Field(default=0.3, gt=0, le=1)
    """Share of the GPU's memory that a colocated vLLM takes."""
    vllm_tensor_parallel: int = Field(default=1, gt=0)
    """GPUs that share a colocated vLLM's model; must divide the number of processes."""
    vllm_sleep: bool = Field(default=False)
    """Give a colocated vLLM's memory back between rollouts: more room to train in, some time per step."""

    @model_validator(mode="after")
    def _weights_can_weigh(self) -> Self:
        wrong = [name for name, weight in self.dimension_weights.items() if not 0 <= weight < math.inf]
        if wrong:
            raise ValueError(f"dimension_weights must be 0 or more: {', '.join(wrong)}")
        if self.combine == "advantages" and self.scale_rewards != "group":
            raise ValueError("combine: advantages divides by the group's standard deviation; use scale_rewards: group")
        return self

    @model_validator(mode="after")
    def _servers_have_addresses(self) -> Self:
        if self.rollouts == "vllm_server" and not self.vllm_urls:
            raise ValueError("rollouts: vllm_server needs vllm_urls, such as [http://127.0.0.1:8000/v1]")
        if wrong := [url for url in self.vllm_urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"vllm_urls: not an http:// address: {wrong[0]!r}")
        if self.vllm_urls and self.rollouts != "vllm_server":
            raise ValueError(f"vllm_urls are given, but rollouts: {self.rollouts} asks no server")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        completions = self.prompts_per_step * self.num_generations
        if completions % self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must divide prompts_per_step x num_generations ({completions})"
            )
        return self
