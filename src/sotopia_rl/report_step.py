"""The last stage of an experiment: what its report shows, gathered from the folders of the stages before."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sotopia_rl import stages
from sotopia_rl.attribute import METHODS
from sotopia_rl.episode import Episode, Rating, UtteranceReward, canonical_json, sha256_text
from sotopia_rl.experiment import Experiment
from sotopia_rl.files import read_text
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.report import ReportInput, write_report
from sotopia_rl.results import load_results
from sotopia_rl.steps import STATUSES, Inputs, Run, base_folder, stage_store
from sotopia_rl.store import EpisodeQuery
from sotopia_rl.train.folder import read_metrics


def report(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    results = load_results(inputs["compare"] / "results.json")
    runs = {name: folder for name, folder in inputs.items() if (folder / "metrics.jsonl").is_file()}
    reports = {name: folder / "report.json" for name, folder in inputs.items() if name.startswith("rm ")}
    page = ReportInput(
        results=results,
        title=e.name,
        curves={name: read_metrics(folder / "metrics.jsonl") for name, folder in runs.items()},
        reward_models={name: json.loads(read_text(path)) for name, path in reports.items() if path.is_file()},
        episodes=_shown_episodes(run, e, inputs),
        provenance=_provenance(e, inputs),
        notes=e.notes,
        gate_min_spearman=e.grpo.gate_min_spearman,
    )
    write_report(page, out)


def _shown_episodes(run: Run, e: Experiment, inputs: Inputs) -> list[tuple[Episode, Rating, list[UtteranceReward]]]:
    """Held-out matches played by SFT and by the first arm: the largest gain, the largest loss, and between them.

    Their utterances are attributed and rewarded here as the training data was.
    """
    arm = next(iter(e.arms))
    with stage_store(inputs["play sft"]) as before, stage_store(inputs[f"play {arm}"]) as after:
        chosen = stages.contrasting_pairs(before, after, e.judge_model, count=e.evaluate.shown_episodes // 2)
    normaliser = stages.read_normaliser(inputs[f"reward {arm}"] / "normaliser.json")
    config = e.arm(arm)
    asks = METHODS[config.annotate.method].asks

    async def credit(pool: ModelPool) -> list[tuple[Episode, Rating, list[UtteranceReward]]]:
        annotator = pool.get(config.annotator_model) if asks else None
        return await stages.reward_shown(
            chosen,
            annotator,
            annotate=config.annotate,
            reward=config.reward,
            normaliser=normaliser,
            limit=e.concurrency,
        )

    return run.with_models(credit)


def _provenance(e: Experiment, inputs: Inputs) -> dict[str, object]:
    """What a reader needs to make the same numbers again."""
    with stage_store(inputs["simulate"]) as store:
        training = {f"episodes {status}": store.count(EpisodeQuery(status=status)) for status in STATUSES}
    with stage_store(inputs["judge"]) as store:
        training |= {"judgements failed": sum(1 for _ in store.failures("judge"))}
    return {
        "seed": e.seed,
        "judge": e.judge_model,
        "annotator": f"{e.annotator_model}, method {e.annotate.label}",
        "prompt profile": e.simulate.prompt_profile,
        "base model": str(base_folder(inputs)),
        "speakers": e.cast.speakers,
        "partners": list(e.evaluate.partners),
        "training data": {name: count for name, count in training.items() if count},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft") if find_spec(name)},
        "experiment": sha256_text(canonical_json(e.model_dump(mode="json")))[:12],
    }
