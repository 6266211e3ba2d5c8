"""`run` and `quickstart`: an experiment file from end to end."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml
from cyclopts.types import ExistingFile

from sotopia_rl.console import bars, err, out, timed
from sotopia_rl.errors import DataError
from sotopia_rl.experiment import Experiment, is_done, load_experiment, run_stage
from sotopia_rl.files import write_text

RESULTS = ("results.json", "report.html", "report.md")


def run(
    experiment: ExistingFile,
    /,
    *,
    output: Path | None = None,
    stages: Path | None = None,
    profiles: Path | None = None,
    seed: int | None = None,
    resume: bool = True,
    retry_failed: bool = False,
) -> None:
    """Run an experiment file, stage by stage.

    A stage that has finished under the same settings and inputs is not run again: a second call does
    nothing, and a changed setting redoes only what depends on it.

    Parameters
    ----------
    experiment
        YAML file; see recipes/ for some.
    output
        Run folder; runs/NAME by default.
    stages
        Folder of finished stages, to share among experiments; stages/ in the run folder by default.
    profiles
        Folder with the published SOTOPIA profiles, for experiments that play in them.
    seed
        Seed of every stage that does not set its own.
    resume
        Go on with stages that were interrupted; --no-resume starts those again.
    retry_failed
        Try again what failed in finished stages, and redo whatever was made of their results.
    """
    overrides: dict[str, Any] = {}
    if profiles is not None:
        overrides["world"] = {"profiles": str(profiles)}
    if seed is not None:
        overrides["seed"] = seed
    loaded = load_experiment(experiment, overrides=overrides)
    execute(loaded, output or Path("runs") / loaded.name, stages, resume=resume, retry_failed=retry_failed)


def quickstart(*, output: Path = Path("runs/quickstart"), seed: int | None = None, resume: bool = True) -> None:
    """Simulate, judge, attribute, reward, train and evaluate: everything real, nothing downloaded.

    Takes a few minutes on two CPU cores. The recipe is recipes/quickstart.yaml.

    Parameters
    ----------
    output
        Run folder.
    seed
        Seed of every stage.
    resume
        Go on with stages that were interrupted; --no-resume starts those again.
    """
    with as_file(files("sotopia_rl") / "quickstart.yaml") as path:
        loaded = load_experiment(path, overrides={} if seed is None else {"seed": seed})
    execute(loaded, output, None, resume=resume)


def execute(
    experiment: Experiment,
    root: Path,
    stages: Path | None,
    *,
    resume: bool,
    retry_failed: bool = False,
    only_report: bool = False,
) -> None:
    """Run every stage of an experiment that has not finished, then show what came out.

    Raises:
        ConfigError: A model that a later stage needs cannot be opened.
        DataError: `only_report`, and a stage before the report has not finished.
    """
    from sotopia_rl.llm.limits import Budget
    from sotopia_rl.pipeline import build, check_models, reopen_failed
    from sotopia_rl.report import results_table
    from sotopia_rl.report.wording import answers
    from sotopia_rl.results import load_results
    from sotopia_rl.steps import Run

    root.mkdir(parents=True, exist_ok=True)
    stages = stages or root / "stages"
    write_text(root / "experiment.yaml", yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))
    with bars() as watch:
        budget = Budget(experiment.limits.max_spend_usd)
        shared = Run(watch, experiment.limits, budget, retry_failed=retry_failed)
        if not only_report:
            check_models(experiment, shared)
        graph = build(experiment, shared)
        if retry_failed:
            reopen_failed(graph, stages)
        for number, stage in enumerate(graph.stages.values(), start=1):
            with timed() as seconds:
                if only_report and stage.name != "report" and not is_done(stage, stages):
                    raise DataError(f"{root}: stage {stage.name} has not finished; run the experiment first")
                worked = run_stage(stage, stages, resume=resume, again=only_report and stage.name == "report")
            done = f"{seconds[0]:6.1f} s" if worked else "finished"
            err.print(f"[dim]{number:>2}/{len(graph.stages)}[/] {stage.name:<9} {done}  [dim]{stage.folder(stages)}[/]")
    report = list(graph.stages.values())[-1].folder(stages)
    for name in RESULTS:
        shutil.copyfile(report / name, root / name)
    results = load_results(root / "results.json")
    out.print(results_table(results))
    for sentence in answers(results):
        out.print(sentence, markup=False, soft_wrap=True)
    for note in experiment.notes:
        out.print(f"[yellow]note[/] {note}")
    out.print(f"results {root / 'results.json'}\nreport  {root / 'report.html'}")
