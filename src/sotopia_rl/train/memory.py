"""How much GPU memory a training stage takes, by arithmetic: before renting a GPU, not instead of measuring on it.

Counted are weights, adapters, gradients and optimizer state, activations, logits, and what in-process generation takes:
the key-value cache and the working set of reading the prompts. Not counted: CUDA context and the allocator's slack, for
which `OVERHEAD` stands. No torch here. `benchmarks/gpu.py` prints the measured peak beside this figure. 1 GB is 1e9
bytes; a "24 GB" card has 25.8e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OVERHEAD = 2.5e9
"""Bytes for CUDA's context, cuBLAS and fragmentation: an allowance, not a measurement."""
CARDS = {"24 GB": 24 * 2**30, "40 GB": 40 * 2**30, "80 GB": 80 * 2**30}
"""Bytes on cards of these names."""
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Of one weight: 4 bits, an 8-bit scale per 64, a 32-bit scale per 256 of those (QLoRA, arXiv 2305.14314)."""
LOGIT_BYTES = 2 + 4 + 4
"""Of one logit in training: as computed, in float32 for the loss, and its gradient."""
Precision = Literal["bfloat16", "nf4"]


@dataclass(frozen=True)
class Shape:
    """The shape of a Qwen2 or Llama model."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False
    attention_bias: bool = False

    @property
    def config_fields(self) -> dict[str, int]:
        """What a `LlamaConfig` or `Qwen2Config` of this shape is given."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
        }

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def key_value_size(self) -> int:
        return self.key_value_heads * self.head_size

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's seven linear maps: q, k, v, o, gate, up, down."""
        h, kv, mlp = self.hidden, self.key_value_size, self.mlp
        return ((h, h), (h, kv), (h, kv), (h, h), (h, mlp), (h, mlp), (mlp, h))

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' linear maps, which is what nf4 packs."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def other_parameters(self) -> int:
        """Embeddings, output layer, norms, biases: kept in 16 bits."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = self.layers * (self.hidden + 2 * self.key_value_size) if self.attention_bias else 0
        return embeddings + biases + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def adapter_parameters(self, rank: int) -> int:
        """Of a LoRA adapter on every linear map."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linears)

    def weight_bytes(self, precision: Precision) -> float:
        if precision == "bfloat16":
            return 2.0 * self.parameters
        return NF4_BYTES * self.linear_parameters + 2.0 * self.other_parameters

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens, in 16 bits."""
        return self.layers * 2 * self.key_value_size * 2 * tokens

    def prefill_bytes(self, tokens: int) -> int:
        """The largest working set while so many prompt tokens are read at once: three inner, three hidden vectors."""
        return 2 * 3 * (self.mlp + self.hidden) * tokens

    def activation_bytes(self, tokens: int, *, checkpointing: bool) -> int:
        """What the backward pass finds of so many tokens, in 16 bits, with an attention that keeps no T x T matrix.

        A layer keeps about 6 hidden vectors (block inputs, normed, query, attention output), key and value, and 4 of
        the inner size (gate, up, activation, product). With checkpointing it keeps its input, and one layer at a time
        is rebuilt.
        """
        layer = 2 * (6 * self.hidden + 2 * self.key_value_size + 4 * self.mlp) * tokens
        return 2 * self.hidden * self.layers * tokens + layer if checkpointing else self.layers * layer


QWEN25_7B = Shape(
    layers=28, hidden=3584, mlp=18944, heads=28, key_value_heads=4, vocabulary=152064, attention_bias=True
)
SMOLLM2_135M = Shape(layers=30, hidden=576, mlp=1536, heads=9, key_value_heads=3, vocabulary=49152, tied=True)


@dataclass(frozen=True)
class Plan:
    """Bytes by what they are for; `total` adds the overhead."""

    weights: float
    adapters: float
    optimizer: float
    activations: float
    logits: float
    generation: float

    @property
    def total(self) -> float:
        """The peak: generation is over when activations and logits come, so the greater of the two counts."""
        fixed = self.weights + self.adapters + self.optimizer
        return OVERHEAD + fixed + max(self.generation, self.activations + self.logits)


def plan(
    shape: Shape,
    stage: Literal["sft", "rm", "grpo"],
    *,
    precision: Precision,
    tokens: int = 4096,
    rows: int = 1,
    completions: int = 16,
    reply_tokens: int = 128,
    rank: int = 8,
    checkpointing: bool = True,
) -> Plan:
    """Memory of one stage on one GPU.

    Args:
        tokens: Of the longest row; of the longest prompt in GRPO.
        rows: Per forward and backward pass.
        completions: Generated at once on this GPU, in process (GRPO); 0 where vLLM servers generate.
        reply_tokens: Of a completion.
    """
    adapter = shape.adapter_parameters(rank)
    length = tokens + (reply_tokens if stage == "grpo" else 0)
    positions = {"sft": tokens, "rm": 0, "grpo": reply_tokens}[stage]  # whose next token is predicted
    generated = shape.cache_bytes(completions * length) + shape.prefill_bytes(completions * tokens)
    return Plan(
        weights=shape.weight_bytes(precision),
        adapters=4.0 * adapter * (3 if stage == "grpo" else 1),  # float32: default, ref and reward, or one
        optimizer=12.0 * adapter,  # gradient and two moments, float32
        activations=rows * shape.activation_bytes(length, checkpointing=checkpointing),
        logits=float(LOGIT_BYTES) * rows * positions * shape.vocabulary,
        generation=float(generated) if stage == "grpo" else 0.0,
    )


def table(shape: Shape = QWEN25_7B) -> str:
    """The memory plan as Markdown: each stage in both precisions, in GB, and the cards that hold it."""
    head = "| stage | weights in | weights | adapters | optimizer | activations | logits | generation | total | fits |"
    lines = [head, "|" + "---|" * 10]
    stages: tuple[Literal["sft", "rm", "grpo"], ...] = ("sft", "rm", "grpo")
    precisions: tuple[Precision, ...] = ("bfloat16", "nf4")
    for stage in stages:
        for precision in precisions:
            found = plan(shape, stage, precision=precision)
            fits = [name for name, size in CARDS.items() if found.total <= size]
            parts = (found.weights, found.adapters, found.optimizer, found.activations, found.logits, found.generation)
            cells = [f"{part / 1e9:.2f}" for part in (*parts, found.total)]
            lines.append(f"| {stage} | {precision} | {' | '.join(cells)} | {', '.join(fits) or 'none'} |")
    return "\n".join(lines)
