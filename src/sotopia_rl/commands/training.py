"""`sft`, `rm` and `grpo`: the training stages on explicit files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts.types import ExistingFile

from sotopia_rl.commands.flags import Flags, resolve
from sotopia_rl.console import bars, err, out
from sotopia_rl.episode import AgentSpec, Sampling
from sotopia_rl.errors import ConfigError
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.open import resolve_model_folder
from sotopia_rl.manifest import load_manifest
from sotopia_rl.simulate import SimulateConfig
from sotopia_rl.tally import StepWatch, step_watch
from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings, TrainerSettings
from sotopia_rl.train.processes import is_main
from sotopia_rl.train.publish import finished_before

if TYPE_CHECKING:
    from sotopia_rl.monitor import Monitor


def sft(
    *,
    rows: ExistingFile,
    base: str,
    output: Path,
    resume: bool = True,
    config: ExistingFile | None = None,
    settings: Flags[SFTSettings] = SFTSettings(),  # noqa: B008  frozen
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
    resume
        Go on with an interrupted run; --no-resume refuses one.
    config
        YAML file with any of the settings below.
    """
    (settings,) = resolve(config, settings)

    model = resolve_model_folder(base)
    result = _finished("sft", settings, output, rows=rows, base=model)
    if result is None:
        from sotopia_rl.train.sft import train_sft

        with _steps("sft") as progress:
            result = train_sft(rows, model, settings, output, resume=resume, progress=progress)
    _say(f"{result.name:<7} {result}")


def rm(
    *,
    rows: ExistingFile,
    base: str,
    output: Path,
    resume: bool = True,
    config: ExistingFile | None = None,
    settings: Flags[RewardModelSettings] = RewardModelSettings(),  # noqa: B008  frozen
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
    resume
        Go on with an interrupted run; --no-resume refuses one.
    config
        YAML file with any of the settings below.
    """
    (settings,) = resolve(config, settings)

    model = resolve_model_folder(base)
    result = _finished("rm", settings, output, rows=rows, base=model)
    if result is None:
        from sotopia_rl.train.reward_model import train_reward_model

        with _steps("reward model") as progress:
            result = train_reward_model(rows, model, settings, output, resume=resume, progress=progress)
    _say(f"adapter {result}\nreport  {output / 'report.json'}")


def grpo(
    *,
    prompts: ExistingFile,
    base: str,
    policy: Path,
    reward_model: Path,
    output: Path,
    validation: ExistingFile | None = None,
    judge: str | None = None,
    partner: list[str] | None = None,
    prompt_profile: str = "default",
    resume: bool = True,
    config: ExistingFile | None = None,
    settings: Flags[GRPOSettings] = GRPOSettings(),  # noqa: B008  frozen
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
    validation
        Manifest of matches (sotopia-rl manifest freeze) that the policy plays and the judge rates every eval_every
        steps; with it, keep: best means the judge's best goal score.
    judge
        Model string of that judge.
    partner
        Model string of who it plays against; several take turns.
    prompt_profile
        Wording of the prompts in those matches: that of the training rows.
    resume
        Go on with an interrupted run; --no-resume refuses one.
    config
        YAML file with any of the settings below.
    """
    (settings,) = resolve(config, settings)

    model = resolve_model_folder(base)
    result = _finished(
        "grpo", settings, output, prompts=prompts, base=model, sft_adapter=policy, reward_adapter=reward_model
    )
    if result is None:
        from sotopia_rl.train.grpo import train_grpo

        monitor = None if validation is None else _monitor(validation, judge, partner or [], prompt_profile, settings)
        with _steps("grpo") as progress:
            result = train_grpo(
                prompts,
                model,
                policy,
                reward_model,
                settings,
                output,
                resume=resume,
                progress=progress,
                eval_hook=None if monitor is None else monitor.hook(output),
            )
    _say(f"adapter {result}")


def _monitor(
    validation: Path, judge: str | None, partners: list[str], prompt_profile: str, settings: GRPOSettings
) -> Monitor:
    """Raises `ConfigError` where judge or partner is missing, or a model string is wrong: before training starts."""
    from sotopia_rl.llm.limits import Budget, ModelLimits
    from sotopia_rl.llm.open import ModelPool
    from sotopia_rl.monitor import Monitor

    if judge is None or not partners:
        raise ConfigError("--validation needs a --judge and at least one --partner")
    for name in (judge, *partners):
        ModelPool().get(name)
    sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_completion_length)
    return Monitor(
        matches=load_manifest(validation).matches,
        partners=[AgentSpec(model=name, sampling=Sampling(max_tokens=sampling.max_tokens)) for name in partners],
        judge=judge,
        sampling=sampling,
        simulate=SimulateConfig(prompt_profile=prompt_profile),
        judging=JudgeConfig(),
        limits=ModelLimits(),
        budget=Budget(),
    )


def _say(text: str) -> None:
    """Once, however many processes train."""
    if is_main():
        out.print(text)


def _finished(stage: str, settings: TrainerSettings, output: Path, **paths: Path) -> Path | None:
    """The result of a run that is over already; torch, which takes seconds to come in, is not needed to say so."""
    result = finished_before(stage, settings, output, **paths)
    if result is not None and is_main():
        err.print(f"{output}: finished already, nothing to train", markup=False, soft_wrap=True)
    return result


@contextmanager
def _steps(name: str) -> Iterator[StepWatch]:
    with bars() as watch:
        yield step_watch(name, watch)
