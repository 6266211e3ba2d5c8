"""GRPO: from the SFT adapter towards what the reward model likes, within reach of the reference policy.

Policy, reference and reward model are adapters of one frozen base (`adapters.py`); what is private to TRL is in
`trl_grpo.py`. The reward model's word is not taken for it: a judge can be asked every few steps (`eval_hook`),
and a policy whose entropy or validity collapses stops the run with the best weights kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from sotopia_rl.dataset import PromptRow, read_rows
from sotopia_rl.errors import TrainingError
from sotopia_rl.llm.folders import template_of
from sotopia_rl.simulate import parse_action
from sotopia_rl.train.adapters import (
    POLICY,
    RewardScorer,
    check_base,
    check_template,
    load_policy,
    saver,
    write_base_note,
)
from sotopia_rl.train.callbacks import Progress, Record, best_step, keep_as_best, train_to_the_end, write_result
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.data import encode_rows, length_report
from sotopia_rl.train.folder import RunFolder, claim, fingerprints
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.processes import from_main
from sotopia_rl.train.publish import conclude, finished_result
from sotopia_rl.train.reward_report import check_gate
from sotopia_rl.train.rollout import prepare_rollouts
from sotopia_rl.train.session import training_session
from sotopia_rl.train.trl_grpo import make_trainer, metric_names
from sotopia_rl.train.utterance_reward import UtteranceReward

MOSTLY = 0.5
"""Share of replies that are cut off above which their limit is to blame."""
COLLAPSE_STEPS = 5
"""Steps in a row below a minimum, or without any signal, that count as a collapse."""


@dataclass(frozen=True)
class Policy:
    """The policy as it stands during training, for a look at it. Its weights change afterwards."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


EvalHook = Callable[[int, Policy], Mapping[str, float]]
"""Called with the step and the policy; returns numbers for the metrics, `score` being what counts as better.

Without `score` the weights of that step are not compared with others.
"""


def train_grpo(  # noqa: PLR0917 - the order of the other stages, with one input more
    prompts: Path,
    base: Path,
    sft_adapter: Path,
    reward_adapter: Path,
    settings: GRPOSettings,
    out: Path,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    eval_hook: EvalHook | None = None,
    leaks_secret: Callable[[PromptRow, str], bool] | None = None,
) -> Path:
    """Train the policy.

    Args:
        prompts: JSONL of `PromptRow`, or of richer rows.
        base: Model folder that both adapters belong to.
        out: Run folder.
        eval_hook: Asked every `eval_every` steps.
        leaks_secret: Whether a reply to a row gives the speaker's secret away, for the curve of leaks.

    Returns:
        `out/adapter`.

    Raises:
        GateError: The reward model is below the gate.
        DataError: Prompts, base or an adapter cannot be read, or prompts do not fit `max_prompt_length`.
        ConfigError: The folder holds a run with other settings, or the device is missing.
        RolloutError: What samples the completions fails; what was trained so far is saved and can be resumed.
        TrainingError: An adapter belongs to another base, the policy collapsed before any weights were worth
            keeping, or the disk or the memory is full.
    """
    paths = {
        "prompts": prompts,
        "base": base,
        "sft_adapter": sft_adapter,
        "reward_adapter": reward_adapter,
        "template": settings.template_path,
    }
    run = claim(out, "grpo", settings, fingerprints(**paths), resume=resume)
    if (result := finished_result(run, settings)) is not None:
        return result
    check_base(sft_adapter, base, task="CAUSAL_LM")
    check_base(reward_adapter, base, task="SEQ_CLS")
    check_gate(reward_adapter, settings.gate_min_spearman)
    with training_session(run, settings):
        tokenizer = load_tokenizer(base, settings.template_path or template_of(sft_adapter))
        check_template(reward_adapter, tokenizer)
        rows = list(read_rows(PromptRow, prompts))
        encoded = encode_rows(tokenizer, rows, max_length=settings.max_prompt_length)
        servers = prepare_rollouts(settings, base, sft_adapter, tokenizer, run)
        set_seed(settings.seed)
        model = load_policy(base, sft_adapter, tokenizer, settings)
        reward = UtteranceReward(
            scorer=RewardScorer(model, reward_adapter, batch_size=settings.batch_size),
            is_valid=is_action,
            settings=settings,
            eos_token_id=tokenizer.eos_token_id,
            leaks_secret=None if leaks_secret is None else lambda number, text: leaks_secret(rows[number], text),
        )
        trainer = make_trainer(model, tokenizer, reward, settings, run, prompts=encoded, servers=servers)
        watch = Watch(run, settings, Policy(model, tokenizer), eval_hook)
        train_to_the_end(trainer, run, [Record(run, progress, metric_names(reward.scorer.outputs)), watch])
        use_best = settings.keep == "best" or watch.collapsed
        adapter = write_result(run, "adapter", saver(model, POLICY), tokenizer, use_best=use_best)
        write_base_note(adapter, base)
    facts = {
        "result": "adapter",
        "steps": trainer.state.global_step,
        "best_step": best_step(run),
        "collapsed": watch.collapsed,
        "data": length_report(encoded),
        "episodes": len({row.episode_id for row in rows}),
    }
    conclude(run, adapter, settings, paths, facts)
    return adapter


def is_action(text: str) -> bool:
    """Whether a reply can be read as an action."""
    try:
        parse_action(text)
    except ValueError:
        return False
    return True


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Asks the judge, keeps the best weights, and notices a collapse.

    It decides by the trainer's log alone, so a resumed run decides as the unbroken one.
    """

    def __init__(self, run: RunFolder, settings: GRPOSettings, policy: Policy, eval_hook: EvalHook | None) -> None:
        self.run = run
        self.settings = settings
        self.policy = policy
        self.eval_hook = eval_hook
        self.collapsed = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Look at a training step that has just been logged."""
        if "reward" not in logs:
            return
        if state.global_step % self.settings.eval_every == 0:
            self._evaluate(state)
        if self.settings.on_collapse != "ignore" and (reason := self._collapse(state.log_history)):
            self._give_up(reason, state, control)

    def _evaluate(self, state: Any) -> None:
        if (hook := self.eval_hook) is not None:
            with undisturbed(self.policy.model):
                found = from_main(lambda: dict(hook(state.global_step, self.policy)))
            values = {f"eval_{name}": value for name, value in found.items()}
            state.log_history.append({"step": state.global_step, **values})
            self.run.append_metrics(state.global_step, values)
            if "score" not in found:  # the judge gave none, so nothing is known of these weights
                return
        scores = self._scores(state.log_history)
        if scores and max(scores) == scores[-1] and scores.index(scores[-1]) == len(scores) - 1:
            metric = "reward" if self.eval_hook is None else "eval_score"
            keep_as_best(
                self.run, saver(self.policy.model, POLICY), step=state.global_step, metric=metric, value=scores[-1]
            )

    def _scores(self, history: list[dict[str, Any]]) -> list[float]:
        """What each evaluation so far counts: the judge's score, or the mean reward since the one before."""
        if self.eval_hook is not None:
            return [entry["eval_score"] for entry in history if "eval_score" in entry]
        rewards, every = [entry["reward"] for entry in history if "reward" in entry], self.settings.eval_every
        return [float(np.mean(rewards[start : start + every])) for start in range(0, len(rewards), every)]

    def _collapse(self, history: list[dict[str, Any]]) -> str | None:
        last = [entry for entry in history[-2 * COLLAPSE_STEPS :] if "reward" in entry][-COLLAPSE_STEPS:]
        if len(last) < COLLAPSE_STEPS:
            return None
        for name, low in (("entropy", self.settings.min_entropy), ("validity", self.settings.min_validity)):
            if all(entry[name] < low for entry in last):
                return f"{name} below {low} for {COLLAPSE_STEPS} steps (now {last[-1][name]:.3g})"
        if all(entry["frac_reward_zero_std"] == 1 for entry in last):
            return f"all replies to a prompt had the same reward for {COLLAPSE_STEPS} steps, so nothing is learned"
        return None

    def _give_up(self, reason: str, state: Any, control: Any) -> None:
        advice = "lower learning_rate or raise beta"
        if [entry for entry in state.log_history if "reward" in entry][-1]["completions/clipped_ratio"] > MOSTLY:
            advice = f"most replies are cut off: raise max_completion_length ({self.settings.max_completion_length})"
        if self.settings.on_collapse == "warn":
            self.run.append_metrics(state.global_step, {"warning": f"the policy collapses: {reason}; {advice}"})
        elif from_main(self.run.best.is_dir):
            self.collapsed = True
            control.should_training_stop = True
        else:
            raise TrainingError(f"step {state.global_step}: the policy collapsed: {reason}; {advice}")


@contextmanager
def undisturbed(model: PeftModel) -> Iterator[None]:
    """Let others use the model without changing what the next training step does."""
    training = model.training
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - trainers use the global one
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
