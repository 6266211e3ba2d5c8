"""Supervised fine-tuning: TRL's SFTTrainer over rows that are tokenised and shortened here.

The loss is on the reply only, its end token included. The adapter is named `default`, because TRL's GRPO
looks for that name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer, pack_dataset

from sotopia_rl.dataset import SFTRow, read_rows
from sotopia_rl.train.adapters import saver, write_base_note
from sotopia_rl.train.batches import language_rows
from sotopia_rl.train.callbacks import KeepBest, Progress, Record, best_step, train_to_the_end, write_result
from sotopia_rl.train.config import SFTSettings
from sotopia_rl.train.conversations import ROW_TOKENS, conversation_padding, conversations
from sotopia_rl.train.data import Encoded, divided
from sotopia_rl.train.folder import RunFolder, claim, fingerprints
from sotopia_rl.train.loading import load_base, load_tokenizer, lora_config, trainer_arguments
from sotopia_rl.train.publish import conclude, finished_result
from sotopia_rl.train.session import training_session

METRIC_NAMES = {"mean_token_accuracy": "token_accuracy", "eval_mean_token_accuracy": "eval_token_accuracy"}


class _Trainer(SFTTrainer):  # type: ignore[misc]  # TRL is untyped here
    """SFTTrainer without the model card in every checkpoint."""

    _total_train_tokens: int

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, which forgets at a resume how many tokens there were, and takes what a mask shows for their number."""
        tokens = inputs.pop(ROW_TOKENS, None)
        if not self._total_train_tokens:
            self._total_train_tokens = max((line.get("num_tokens", 0) for line in self.state.log_history), default=0)
        before = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if tokens is not None and model.training:
            self._total_train_tokens = before + self.accelerator.gather_for_metrics(tokens.sum()).sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Cards are written once, beside the result."""


def train_sft(
    rows: Path, base: Path, settings: SFTSettings, out: Path, *, resume: bool = True, progress: Progress | None = None
) -> Path:
    """Fine-tune `base` on `rows`.

    Args:
        rows: JSONL of `SFTRow`.
        base: Model folder.
        out: Run folder.

    Returns:
        `out/adapter`, or `out/model` after full fine-tuning.

    Raises:
        DataError: Rows or base cannot be read, or rows do not fit `max_length`.
        ConfigError: The folder holds a run with other settings, or the device is missing.
        TrainingError: The disk or the memory is full.
    """
    paths = {"rows": rows, "base": base, "template": settings.template_path}
    run = claim(out, "sft", settings, fingerprints(**paths), resume=resume)
    if (result := finished_result(run, settings)) is not None:
        return result
    name = "model" if settings.tuning == "full" else "adapter"
    with training_session(run, settings):
        tokenizer = load_tokenizer(base, settings.template_path)
        data = divided(tokenizer, list(read_rows(SFTRow, rows)), settings)
        set_seed(settings.seed)
        model = load_base(base, tokenizer, settings)
        trainer = make_trainer(model, tokenizer, settings, run, train_rows=data.train_rows, eval_rows=data.eval_rows)
        watch = KeepBest(run, saver(trainer.model), patience=settings.patience)
        train_to_the_end(trainer, run, [Record(run, progress, METRIC_NAMES), *([watch] if data.eval_rows else [])])
        use_best = settings.keep == "best" and bool(data.eval_rows)
        target = write_result(run, name, saver(trainer.model), tokenizer, use_best=use_best)
        write_base_note(target, base)
    facts = {
        "result": name,
        "steps": trainer.state.global_step,
        "best_step": best_step(run),
        **data.facts(),
    }
    conclude(run, target, settings, paths, facts)
    return target


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SFTSettings,
    run: RunFolder,
    *,
    train_rows: list[Encoded],
    eval_rows: list[Encoded],
) -> SFTTrainer:
    together = settings.packing == "conversation"
    return _Trainer(
        model=model,
        args=SFTConfig(
            **trainer_arguments(settings, run, evaluate=bool(eval_rows)),
            max_length=settings.max_length if settings.packing == "packed" else None,
            packing=settings.packing == "packed",
            padding_free=settings.packing in ("packed", "padding_free"),
            remove_unused_columns=not together,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=training_rows(train_rows, settings),
        eval_dataset=held_out_rows(eval_rows, settings) if eval_rows else None,
        data_collator=conversation_padding(model.config, tokenizer.pad_token_id) if together else None,
        processing_class=tokenizer,
        peft_config=lora_config(settings, "CAUSAL_LM") if settings.tuning == "lora" else None,
    )


def training_rows(encoded: list[Encoded], settings: SFTSettings) -> Dataset:
    """The rows, several to one where they are packed: whole, and with their lengths, which set their limits."""
    if settings.packing != "packed":
        return held_out_rows(encoded, settings)
    return pack_dataset(language_rows(encoded).shuffle(settings.seed), settings.max_length, "bfd")


def held_out_rows(encoded: list[Encoded], settings: SFTSettings) -> Dataset:
    """The rows, those of a conversation together where the settings say so, never packed otherwise."""
    if settings.packing == "conversation":
        return conversations(encoded, settings.max_length)
    return language_rows(encoded)
