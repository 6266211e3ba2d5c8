"""The flags of the paper's training scripts (github: sotopia-lab/sotopia-rl, step 2 of its README), as our settings.

Each flag is a line of a table: the setting it becomes, or what is said where it has no meaning here. Their rows,
`input, output[, value]`, become ours; the results are linked where the next script looks for them. No torch here until
training starts. How the rows are made is in `paper.py` and `paper_rows.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sotopia_rl.config import Config, parse_config
from sotopia_rl.console import err, out
from sotopia_rl.dataset import PromptRow, RewardRow, SFTRow, write_rows
from sotopia_rl.episode import sha256_text
from sotopia_rl.errors import ConfigError, DataError, SotopiaRLError
from sotopia_rl.models import Message
from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings
from sotopia_rl.train.processes import count, is_main, main_first

StageName = Literal["sft", "rm", "grpo"]
BEST = ("best-checkpoints", "best-checkpoint")
"""Their README looks for the first name, their shell scripts for the second."""


@dataclass(frozen=True)
class Flag:
    """A flag of the published scripts.

    Attributes:
        type: `bool` takes no value.
        setting: The field of the stage's settings that it is; empty where `settings_of` reads it, or nothing does.
        unused: Said when it is given and means nothing here.
    """

    name: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    required: bool = False
    setting: str = ""
    unused: str = ""


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _threshold(text: str) -> float | None:
    return None if text == "none" else float(text)


SHARED = (
    Flag("model_name", "base model: a folder, or smollm2", required=True),
    Flag("template_path", "Jinja chat template; without it the model's own", Path, setting="template_path"),
    Flag("use_qlora", "hold the frozen base in four bits", bool),
    Flag("max_steps", "(not in the paper's script) stop after so many optimizer steps instead of epochs", int),
    Flag("seed", "(not in the paper's script) of the weights, the split and the order", int, 0, setting="seed"),
    Flag("wandb_project", "log to this project of Weights & Biases; by default to metrics.jsonl alone"),
    Flag("wandb_run_name", "name of the run there"),
)
ADAPTER = (
    Flag("max_length", "longest row in tokens; a longer one loses its oldest turns", int, 4096, setting="max_length"),
    Flag("train_batch_size", "rows per device and forward pass", int, 1, setting="batch_size"),
    Flag("val_batch_size", "", int, unused="the held-out rows take twice the training batch; the loss is the same"),
    Flag("accumulation_steps", "forward passes per optimizer step", int, 1, setting="accumulation"),
    Flag("num_epochs", "passes over the rows", float, 3.0),
    Flag("evaluation_steps", "steps between held-out evaluations, and between checkpoints", int, 100),
    Flag("weight_decay", "", float, 0.01, setting="weight_decay"),
    Flag("val_ratio", "share of the episodes held out", float, 0.05, setting="held_out_share"),
    Flag("lora_r", "rank of the adapter", int, 8, setting="lora_r"),
    Flag("lora_alpha", "", float, 16.0, setting="lora_alpha"),
    Flag("lora_dropout", "", float, 0.1, setting="lora_dropout"),
    Flag("target_modules", "adapted layers, by comma", _names, ("c_attn", "q_proj", "v_proj"), setting="lora_targets"),
    Flag("checkpoint_dir", "folder of the run", Path, required=True),
)
FLAGS: Mapping[StageName, tuple[Flag, ...]] = {
    "sft": (
        *SHARED,
        *ADAPTER,
        Flag("sft_data_path", "JSON array of input and output", Path, required=True),
        Flag("learning_rate", "", float, 1e-4, setting="learning_rate"),
        Flag("use_lora", "train an adapter; without it and --use_qlora, every weight", bool),
        Flag("local-rank", "", int, unused="the launcher's environment says which process this is"),
    ),
    "rm": (
        *SHARED,
        *ADAPTER,
        Flag("reward_data_path", "JSON array of input, output and value", Path, required=True),
        Flag("learning_rate", "", float, 4e-5, setting="learning_rate"),
        Flag("use_lora", "", bool, unused="the reward model is always an adapter"),
        Flag("warmup_epochs", "", float, unused="the warm-up is the first 5% of the steps"),
        Flag("min_lr", "", float, unused="the cosine ends at zero"),
    ),
    "grpo": (
        *SHARED,
        Flag("grpo_data_path", "JSON array of input (output is not read)", Path, required=True),
        Flag("policy_adapter_path", "adapter to start from: train_sft.py's", Path, required=True),
        Flag("reward_adapter_path", "reward model: train_rm.py's", Path, required=True),
        Flag("learning_rate", "", float, 5e-6, setting="learning_rate"),
        Flag("max_length", "longest prompt in tokens; a longer one loses its oldest turns", int, 4096),
        Flag("response_length", "longest reply in tokens", int, 128, setting="max_completion_length"),
        Flag("per_device_train_batch_size", "completions per device and forward pass", int, 1, setting="batch_size"),
        Flag("per_device_eval_batch_size", "", int, unused="prompts have no held-out loss"),
        Flag("gradient_accumulation_steps", "forward passes per optimizer step", int, 1),
        Flag("num_grpo_epochs", "passes over the prompts (their code never read it)", float, 2.0),
        Flag("num_train_epochs", "the same, and goes before it", float),
        Flag("num_generations", "completions per prompt", int, 16, setting="num_generations"),
        Flag("use_lora_train_grpo", "", bool, unused="policy and reward model are always adapters of one base"),
        Flag("beta", "weight of the KL divergence", float, 0.04, setting="beta"),
        Flag("reference", "(not in the paper's script) sft, or base as in its library", str, "sft", setting="ref"),
        Flag(
            "min_spearman",
            "(not in the paper's script) refuse a reward model with a lower rank correlation; none for any",
            _threshold,
            0.3,
            setting="gate_min_spearman",
        ),
        Flag("val_ratio", "", float, unused="no prompt is held out"),
        Flag("save_steps", "steps between checkpoints", int, 50, setting="save_every"),
        Flag("output_dir", "folder of the run", Path, required=True),
    ),
}
SETTINGS: Mapping[StageName, type[Config]] = {"sft": SFTSettings, "rm": RewardModelSettings, "grpo": GRPOSettings}
ROWS: Mapping[StageName, type[PromptRow]] = {"sft": SFTRow, "rm": RewardRow, "grpo": PromptRow}
OF_THE_README = ("use_lora", "use_lora_train_grpo")
"""Switches in the README's own commands: a note about them would only be noise."""


def parser(stage: StageName, description: str) -> argparse.ArgumentParser:
    """The command line of `train_STAGE.py`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in FLAGS[stage]:
        words = (f"accepted: {flag.unused}" if flag.unused else flag.help).replace("%", "%%")
        if flag.type is bool:
            made.add_argument(f"--{flag.name}", action="store_true", help=words)
            continue
        shown = "" if flag.default is None else f" (default: {_shown(flag.default)})".lstrip("" if words else " ")
        made.add_argument(
            f"--{flag.name}", type=flag.type, default=flag.default, required=flag.required, help=words + shown
        )
    return made


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def notes(stage: StageName, given: argparse.Namespace) -> list[str]:
    """One line per given flag that means nothing here."""
    unused = [flag for flag in FLAGS[stage] if flag.unused and flag.name not in OF_THE_README]
    values = vars(given)
    return [f"--{f.name}: {f.unused}" for f in unused if values[f.name.replace("-", "_")] not in (None, False)]


def settings_of(stage: StageName, given: argparse.Namespace, *, processes: int) -> Any:
    """The settings that the flags describe, on so many processes.

    Raises:
        ConfigError: A value is out of range, or the batch does not hold whole groups of completions.
    """
    values = {f.setting: getattr(given, f.name) for f in FLAGS[stage] if f.setting}
    values["quantise"] = "nf4" if given.use_qlora else "none"
    if given.wandb_project:
        values["trackers"] = ("wandb",)
    if stage == "grpo":
        values |= _grpo_values(given, processes)
        epochs = given.num_grpo_epochs if given.num_train_epochs is None else given.num_train_epochs
    else:
        values |= {"eval_every": given.evaluation_steps, "save_every": given.evaluation_steps}
        epochs = given.num_epochs
    if stage == "sft":
        values["tuning"] = "lora" if given.use_lora or given.use_qlora else "full"
    values |= {"num_epochs": epochs} if given.max_steps is None else {"max_steps": given.max_steps}
    return parse_config(SETTINGS[stage], values, where="flags")


def _grpo_values(given: argparse.Namespace, processes: int) -> dict[str, Any]:
    passes = given.per_device_train_batch_size * given.gradient_accumulation_steps
    completions, group = passes * processes, given.num_generations
    if completions % group:
        raise ConfigError(
            f"per_device_train_batch_size {given.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{given.gradient_accumulation_steps} x {processes} processes = {completions} completions per step, "
            f"which --num_generations {group} does not divide; change one of them"
        )
    return {"prompts_per_step": completions // group, "max_prompt_length": given.max_length}


# --- rows ----------------------------------------------------------------------------------------------------------


def read_paper_rows(stage: StageName, path: Path) -> Iterator[PromptRow]:
    """The rows of a file for `train_STAGE.py`.

    They name neither episode nor turn. The turn stands at the end of the prompt; rows of the same scenario and
    participants count as one episode, so that no conversation is divided between training and held-out rows.

    Raises:
        DataError: The file is no JSON array, or a row lacks a field or has a value outside 0..10.
    """
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(items, list) or not items:
        raise DataError(f"{path}: expected a JSON array of rows, found {type(items).__name__}, {len(items or ())} long")
    for number, item in enumerate(items, start=1):
        yield _row(stage, item, f"{path}: row {number}")


def _row(stage: StageName, item: object, where: str) -> PromptRow:
    wanted = {"sft": ("input", "output"), "rm": ("input", "output", "value"), "grpo": ("input",)}[stage]
    if not isinstance(item, dict) or any(name not in item for name in wanted):
        found = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
        raise DataError(f"{where}: expected {', '.join(wanted)}; found {found or 'nothing'}")
    prompt = item["input"]
    if not isinstance(prompt, str) or (stage != "grpo" and not isinstance(item["output"], str)):
        raise DataError(f"{where}: input and output must be texts")
    episode, turn = place_of(prompt)
    row: dict[str, Any] = {"prompt": (Message(role="user", content=prompt),), "episode_id": episode}
    row |= {"scenario_id": episode, "turn": turn, "seat": turn % 2}
    if stage != "grpo":
        row["completion"] = (Message(role="assistant", content=item["output"]),)
    if stage == "rm":
        row["value"] = item["value"]
    try:
        return ROWS[stage].model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: {name}: {first['msg']} (found {first['input']!r:.60})") from error


def place_of(prompt: str) -> tuple[str, int]:
    """(what stands for the episode, turn) of one of the paper's prompts; (its hash, 0) of any other text."""
    marks = list(re.finditer(r"^You are at Turn #(\d+)", prompt, flags=re.MULTILINE))
    opening = re.search(r"^Scenario: .*?^Participants: [^\n]*", prompt, flags=re.MULTILINE | re.DOTALL)
    episode = sha256_text(opening.group() if opening else prompt)[:16]
    return episode, int(marks[-1].group(1)) if marks else 0


# --- training ------------------------------------------------------------------------------------------------------


def command(stage: StageName, description: str) -> None:
    """All of `train_STAGE.py`: read the flags, say which mean nothing here, train, print where the result is.

    Raises:
        SystemExit: With one line, where the flags, the data or the training fail.
    """
    given = parser(stage, description).parse_args()
    for note in notes(stage, given) if is_main() else ():
        err.print(note, markup=False, soft_wrap=True)
    try:
        result = train(stage, given)
    except SotopiaRLError as error:
        sys.exit(f"error: {error}")
    if is_main():
        out.print(str(result), markup=False, soft_wrap=True)


def train(stage: StageName, given: argparse.Namespace) -> Path:
    """Do what `train_STAGE.py` was asked; the adapter (or model), also to be found under `best-checkpoints`.

    Raises:
        SotopiaRLError: As the training functions and `read_paper_rows`.
    """
    settings = settings_of(stage, given, processes=count())
    if given.wandb_project:
        os.environ["WANDB_PROJECT"] = given.wandb_project
        os.environ |= {"WANDB_NAME": given.wandb_run_name} if given.wandb_run_name else {}
    folder = given.output_dir if stage == "grpo" else given.checkpoint_dir
    data = {"sft": "sft_data_path", "rm": "reward_data_path", "grpo": "grpo_data_path"}[stage]
    return _train(stage, getattr(given, data), given, settings, folder)


def _train(stage: StageName, data: Path, given: argparse.Namespace, settings: Any, folder: Path) -> Path:
    from sotopia_rl.llm.open import resolve_model_folder

    with main_first():
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_rows(read_paper_rows(stage, data), folder / "rows.jsonl")
        base = resolve_model_folder(given.model_name)
    rows = folder / "rows.jsonl"
    if stage == "sft":
        from sotopia_rl.train.sft import train_sft

        result = train_sft(rows, base, settings, folder)
    elif stage == "rm":
        from sotopia_rl.train.reward_model import train_reward_model

        result = train_reward_model(rows, base, settings, folder)
    else:
        from sotopia_rl.train.grpo import train_grpo

        result = train_grpo(rows, base, given.policy_adapter_path, given.reward_adapter_path, settings, folder)
    if is_main():
        link_best(result)
    return result


def link_best(result: Path) -> None:
    """Let the names that the next script looks for stand beside `result` and mean it."""
    for name in BEST:
        link = result.with_name(name)
        if link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(result.name)
