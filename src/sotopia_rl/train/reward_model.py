"""The reward model: a LoRA adapter and a linear head that predict utterance rewards from token ids.

Its input is what the policy sees and says: the policy's prompt ids, the reply's ids, the end token. Targets
are on 0..1. The head starts at zero: a random one begins with errors and gradients hundreds of times larger.
It is saved as a PEFT sequence classifier, head included, which transformers and vLLM load as such.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from sotopia_rl.dataset import RewardRow, read_rows
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.train.adapters import COMBINED, saver, write_base_note
from sotopia_rl.train.batches import TargetPadding, padded_inputs, target_rows
from sotopia_rl.train.callbacks import KeepBest, Progress, Record, best_step, train_to_the_end, write_result
from sotopia_rl.train.config import RewardModelSettings, TrainerSettings
from sotopia_rl.train.conversations import ConversationPadding, conversation_padding, conversations
from sotopia_rl.train.data import Divided, Encoded, divided
from sotopia_rl.train.folder import RunFolder, claim, fingerprints, write_json
from sotopia_rl.train.loading import load_base, load_tokenizer, lora_config, only_errors, trainer_arguments
from sotopia_rl.train.processes import is_main, weights_are_divided
from sotopia_rl.train.publish import conclude, finished_result
from sotopia_rl.train.reward_loss import RewardTrainer
from sotopia_rl.train.reward_report import RewardReport, group_keys, report_output
from sotopia_rl.train.session import training_session


def train_reward_model(
    rows: Path,
    base: Path,
    settings: RewardModelSettings,
    out: Path,
    *,
    resume: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Fit a reward model on `rows` and report how it does on the episodes held out.

    Args:
        rows: JSONL of `RewardRow`.
        base: Model folder, the one that the policy uses.
        out: Run folder; `out/report.json` is the report.

    Returns:
        `out/adapter`, with a copy of the report.

    Raises:
        DataError: Rows or base cannot be read, rows do not fit `max_length`, or all rewards are equal.
        ConfigError: The folder holds a run with other settings, or the device is missing.
        TrainingError: The disk or the memory is full.
    """
    paths = {"rows": rows, "base": base, "template": settings.template_path}
    run = claim(out, "rm", settings, fingerprints(**paths), resume=resume)
    if (result := finished_result(run, settings)) is not None:
        return result
    if weights_are_divided():
        raise ConfigError(
            "the reward model's report needs whole weights; use configs/accelerate/ddp.yaml or zero2.yaml"
        )
    with training_session(run, settings):
        tokenizer = load_tokenizer(base, settings.template_path)
        read = list(read_rows(RewardRow, rows))
        check_targets(rows, read, settings.dimensions)
        data = divided(tokenizer, read, settings)
        set_seed(settings.seed)
        model = new_reward_model(base, tokenizer, settings)
        trainer = make_trainer(model, tokenizer, settings, run, data)
        watch = KeepBest(run, saver(model), patience=settings.patience)
        train_to_the_end(trainer, run, [Record(run, progress), *([watch] if data.eval_rows else [])])
        use_best = settings.keep == "best" and bool(data.eval_rows)
        adapter = write_result(run, "adapter", saver(model), tokenizer, use_best=use_best)
        write_base_note(adapter, base)
        set_peft_model_state_dict(model, load_peft_weights(str(adapter), device=str(model.device)))
        predicted = predict(model, data.eval_rows, tokenizer.pad_token_id, batch_size=2 * settings.batch_size)
    report = make_report(settings, data, predicted)
    if is_main():
        write_json(run.path / "report.json", report.model_dump())
        shutil.copy(run.path / "report.json", adapter / "report.json")
    facts = {
        "result": "adapter",
        "steps": trainer.state.global_step,
        "best_step": best_step(run),
        **data.facts(),
    }
    conclude(run, adapter, settings, paths, facts)
    return adapter


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: RewardModelSettings,
    run: RunFolder,
    data: Divided[RewardRow],
) -> RewardTrainer:
    """The trainer that our settings describe."""
    held_out = rows_with_targets(data.eval_rows, data.held_out, settings) if data.eval_rows else None
    return RewardTrainer(
        model=model,
        args=TrainingArguments(
            **trainer_arguments(settings, run, evaluate=held_out is not None),
            label_names=["labels"],
            prediction_loss_only=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows_with_targets(data.train_rows, data.training, settings),
        eval_dataset=held_out,
        data_collator=collator(model.config, tokenizer.pad_token_id, settings),
        ranking_weight=settings.ranking_weight if settings.loss == "mse_ranking" else 0.0,
    )


def rows_with_targets(encoded: Sequence[Encoded], rows: Sequence[RewardRow], settings: RewardModelSettings) -> Dataset:
    """The rows as the trainer takes them, those of a conversation together where the settings say so."""
    values = targets(rows, settings.dimensions)
    if settings.packing == "conversation":
        return conversations(encoded, settings.max_length, values)
    return target_rows(encoded, values)


def collator(config: Any, pad_token_id: int, settings: RewardModelSettings) -> TargetPadding | ConversationPadding:
    """What makes tensors of `rows_with_targets`."""
    if settings.packing == "conversation":
        return conversation_padding(config, pad_token_id)
    return TargetPadding(pad_token_id)


def names_of(dimensions: Sequence[str]) -> tuple[str, ...]:
    """Names of the outputs, in order."""
    return tuple(dimensions) or (COMBINED,)


def targets(rows: Sequence[RewardRow], dimensions: Sequence[str]) -> list[list[float]]:
    """[N, D] on 0..1."""
    if not dimensions:
        return [[row.value / 10] for row in rows]
    return [[row.values[name] for name in dimensions] for row in rows]


def check_targets(path: Path, rows: Sequence[RewardRow], dimensions: Sequence[str]) -> None:
    """Refuse rewards that nothing can be learned from, before anything expensive starts.

    Raises:
        DataError: A row lacks a dimension, or all rewards of an output are equal.
    """
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in dimensions if name not in row.values]:
            raise DataError(f"{path}:{number}: no reward for {', '.join(missing)} (it has {', '.join(row.values)})")
    for name, column in zip(names_of(dimensions), np.array(targets(rows, dimensions)).T, strict=True):
        if np.ptp(column) == 0:
            given = column[0] if dimensions else 10 * column[0]
            raise DataError(f"{path}: all {len(column)} rewards of {name} are {given:g}; nothing can be learned")


def new_reward_model(base: Path, tokenizer: PreTrainedTokenizerBase, settings: RewardModelSettings) -> PeftModel:
    """The base as a sequence classifier with a fresh adapter and a head of zeros."""
    model = load_classifier(base, tokenizer, settings, outputs=len(names_of(settings.dimensions)))
    torch.nn.init.zeros_(model.score.weight)
    return get_peft_model(model, lora_config(settings, "SEQ_CLS"))


def load_classifier(
    base: Path, tokenizer: PreTrainedTokenizerBase, settings: TrainerSettings, *, outputs: int
) -> PreTrainedModel:
    """The base with a head of `outputs` numbers in place of its language model head."""
    with only_errors():  # that the base has no such head is known
        return load_base(
            base,
            tokenizer,
            settings,
            model_class=AutoModelForSequenceClassification,
            num_labels=outputs,
            problem_type="regression",
        )


def load_reward_model(
    base: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase, settings: RewardModelSettings
) -> PeftModel:
    """A trained reward model on a base of its own, ready to score."""
    model = load_classifier(base, tokenizer, settings, outputs=len(names_of(settings.dimensions)))
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def predict(model: PeftModel, rows: Sequence[Encoded], pad_token_id: int, *, batch_size: int) -> list[list[float]]:
    """[N, D] predictions."""
    model.eval()
    predictions: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        batch = padded_inputs([row.ids for row in rows[start : start + batch_size]], pad_token_id)
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        predictions.extend(logits.float().tolist())
    return predictions


def make_report(
    settings: RewardModelSettings, data: Divided[RewardRow], predicted: Sequence[Sequence[float]]
) -> RewardReport:
    """Compare the predictions for the held-out rows, output by output."""
    held_out, wanted = data.held_out, targets(data.held_out, settings.dimensions)
    groups, keys = group_keys(
        [row.prompt[-1].content for row in held_out],
        [(row.scenario_id, row.seat, row.turn) for row in held_out],
        [row.turn for row in held_out],
    )
    means = np.mean(np.array(targets(data.training, settings.dimensions)), axis=0)
    outputs = [
        report_output(
            name,
            [row[place] for row in predicted],
            [row[place] for row in wanted],
            keys,
            train_mean=float(means[place]),
        )
        for place, name in enumerate(names_of(settings.dimensions))
    ]
    episodes = len({row.episode_id for row in held_out})
    return RewardReport(groups=groups, held_out_episodes=episodes, outputs=tuple(outputs))
