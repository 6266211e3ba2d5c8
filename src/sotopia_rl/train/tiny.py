"""A causal language model small enough to be made on the spot: the base of the quickstart and the tests.

Its tokenizer is a byte-level BPE trained on the rows at hand, with ChatML as its chat template; its
architecture is Llama's, so that everything that loads a real base loads this one (not Qwen2's: for that
model type transformers ignores the tokenizer in the folder and builds Qwen's own). Merges may cross words:
the fixed phrases of a prompt become few tokens, which is where a small model's time goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sotopia_rl.dataset import SFTRow, read_rows
from sotopia_rl.train.batches import WeightPadding, weighted_rows
from sotopia_rl.train.callbacks import Progress, Record, train_to_the_end, write_result
from sotopia_rl.train.config import TinyModelSettings
from sotopia_rl.train.data import encode_rows, length_report, reply_text
from sotopia_rl.train.folder import claim, fingerprints
from sotopia_rl.train.loading import device_of, trainer_arguments
from sotopia_rl.train.publish import conclude, finished_result
from sotopia_rl.train.session import training_session

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LONGEST_TOKEN = 32
"""In bytes: long enough for a phrase, too short for a sentence."""


class _WeightedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Cross-entropy with a weight per token: names and numbers of a prompt cannot be foreseen, a reply can."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Mean over the batch's weights; `inputs` are ids, mask and weights, each [B, T]."""
        weights = inputs.pop("weights")[:, 1:]
        targets = inputs["input_ids"][:, 1:]
        logits = model(**inputs).logits[:, :-1]
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return (losses * weights).sum() / weights.sum()


def train_base(
    rows: Path, settings: TinyModelSettings, out: Path, *, resume: bool = True, progress: Progress | None = None
) -> Path:
    """Make a tiny model and pre-train it on whole rows, prompt and reply alike.

    Args:
        rows: JSONL of `SFTRow`.
        out: Run folder; `out/model` is the result.

    Returns:
        The model folder.

    Raises:
        DataError: The rows cannot be read or do not fit.
        ConfigError: The folder holds a run with other settings.
    """
    run = claim(out, "base", settings, fingerprints(rows=rows), resume=resume)
    if (result := finished_result(run, settings)) is not None:
        return result
    with training_session(run, settings):
        data = list(read_rows(SFTRow, rows))
        tokenizer = tiny_tokenizer([_text(row) for row in data], settings.vocabulary)
        encoded = encode_rows(tokenizer, data, max_length=settings.max_length, reply=reply_text)
        model = tiny_model(tokenizer, settings)
        trainer = _WeightedTrainer(
            model=model,
            args=TrainingArguments(
                **trainer_arguments(settings, run, evaluate=False),
                remove_unused_columns=False,
                train_sampling_strategy="group_by_length",
                adam_beta2=0.95,  # a run is too short for the default's memory of a thousand steps
            ),
            train_dataset=weighted_rows(encoded, settings.prompt_weight),
            data_collator=WeightPadding(tokenizer.pad_token_id),
        )
        train_to_the_end(trainer, run, [Record(run, progress)])
        target = write_result(run, "model", model.save_pretrained, tokenizer, use_best=False)
    facts = {
        "result": "model",
        "steps": trainer.state.global_step,
        "parameters": model.num_parameters(),
        "data": length_report(encoded),
        "episodes": len({row.episode_id for row in data}),
    }
    conclude(run, target, settings, {"rows": rows}, facts)
    return target


def _text(row: SFTRow) -> str:
    """A row as the chat template shows it, but for the special tokens."""
    return f"user\n{row.prompt[-1].content}\nassistant\n{reply_text(row)}"


def tiny_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`: any text comes back unchanged, each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, settings: TinyModelSettings) -> LlamaForCausalLM:
    """A Llama of the given shape with random weights."""
    set_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.mlp_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # transformers' 0.02 is meant for wide models; here it costs a third of the steps (100 steps: loss 2.2, not 1.1)
        initializer_range=settings.hidden_size**-0.5,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config).to(device_of(settings))
