"""`sft`, `rm` and `grpo`: the training stages on explicit files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile

from sotopia_rl.commands.options import resolve
from sotopia_rl.console import bars, out
from sotopia_rl.stages import StepWatch, step_watch
from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings


def sft(
    *,
    rows: ExistingFile,
    base: str,
    output: Path,
    config: ExistingFile | None = None,
    settings: Annotated[SFTSettings, Parameter(name="*")] = SFTSettings(),  # noqa: B008  frozen
    resume: bool = True,
) -> None:
    """Fine-tune a base model on replies worth imitating.

    Parameters
    ----------
    rows
        JSONL of prompt and completion, as `sotopia-rl reward` writes it (sft.jsonl).
    base
        Model folder, or `smollm2`.
    output
        Run folder; the adapter will be in its adapter/.
    config
        YAML file with any of the settings below.
    resume
        Go on with an interrupted run; --no-resume refuses one.
    """
    from sotopia_rl.llm.open import resolve_model_folder
    from sotopia_rl.train.sft import train_sft

    chosen = resolve(settings, config)
    with _steps("sft") as progress:
        result = train_sft(rows, resolve_model_folder(base), chosen, output, resume=resume, progress=progress)
    out.print(f"adapter {result}")


def rm(
    *,
    rows: ExistingFile,
    base: str,
    output: Path,
    config: ExistingFile | None = None,
    settings: Annotated[RewardModelSettings, Parameter(name="*")] = RewardModelSettings(),  # noqa: B008  frozen
    resume: bool = True,
) -> None:
    """Train a reward model on utterance rewards, and report how good it is.

    Parameters
    ----------
    rows
        JSONL of prompt, completion and value, as `sotopia-rl reward` writes it (reward.jsonl).
    base
        Model folder, or `smollm2`.
    output
        Run folder; the adapter will be in its adapter/, the report in report.json.
    config
        YAML file with any of the settings below.
    resume
        Go on with an interrupted run; --no-resume refuses one.
    """
    from sotopia_rl.llm.open import resolve_model_folder
    from sotopia_rl.train.reward_model import train_reward_model

    chosen = resolve(settings, config)
    with _steps("reward model") as progress:
        result = train_reward_model(rows, resolve_model_folder(base), chosen, output, resume=resume, progress=progress)
    out.print(f"adapter {result}\nreport  {output / 'report.json'}")


def grpo(
    *,
    prompts: ExistingFile,
    base: str,
    policy: Path,
    reward_model: Path,
    output: Path,
    config: ExistingFile | None = None,
    settings: Annotated[GRPOSettings, Parameter(name="*")] = GRPOSettings(),  # noqa: B008  frozen
    resume: bool = True,
) -> None:
    """Train the policy against the reward model, both adapters of one base.

    Parameters
    ----------
    prompts
        JSONL of prompts; reward.jsonl serves.
    base
        Model folder, or `smollm2`.
    policy
        Adapter to start from, as `sotopia-rl sft` writes it.
    reward_model
        Reward adapter, as `sotopia-rl rm` writes it, with its report beside it.
    output
        Run folder; the adapter will be in its adapter/.
    config
        YAML file with any of the settings below.
    resume
        Go on with an interrupted run; --no-resume refuses one.
    """
    from sotopia_rl.llm.open import resolve_model_folder
    from sotopia_rl.train.grpo import train_grpo

    chosen = resolve(settings, config)
    with _steps("grpo") as progress:
        result = train_grpo(
            prompts, resolve_model_folder(base), policy, reward_model, chosen, output, resume=resume, progress=progress
        )
    out.print(f"adapter {result}")


@contextmanager
def _steps(name: str) -> Iterator[StepWatch]:
    with bars() as watch:
        yield step_watch(name, watch)
