"""`evaluate` and `report`: which of two systems does better, and the page that says so."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile

from sotopia_rl import stages
from sotopia_rl.commands.data import with_models
from sotopia_rl.commands.options import named_manifest, resolve
from sotopia_rl.config import parse_config, read_yaml
from sotopia_rl.console import bars, out
from sotopia_rl.episode import AgentSpec, Sampling
from sotopia_rl.errors import ConfigError
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.manifest import evaluation_pairings
from sotopia_rl.simulate import SimulateConfig
from sotopia_rl.store import open_store


def evaluate(
    *,
    manifest: str,
    system: list[str],
    partner: list[str],
    judge: str,
    output: Path,
    count: int = 40,
    profiles: Path | None = None,
    seed: int = 0,
    temperature: float = 0.7,
    greedy: bool = False,
    max_tokens: int = 512,
    resume: bool = True,
    retry_failed: bool = False,
    config: ExistingFile | None = None,
    settings: Annotated[SimulateConfig, Parameter(name="*")] = SimulateConfig(),  # noqa: B008  frozen
    limits: Annotated[ModelLimits, Parameter(name="*")] = ModelLimits(),  # noqa: B008  frozen
) -> None:
    """Play every system over one manifest against the same partners, judge, and compare pair by pair.

    Every system is compared with the first one named.

    Parameters
    ----------
    manifest
        sandbox-train, sandbox-held-out, sotopia-hard, sotopia-all, or a manifest file.
    system
        NAME=MODEL, twice or more; the first is what the others are compared with.
    partner
        Model string of a fixed partner; several make a panel.
    judge
        Model string of the judge.
    output
        Run folder for episodes, results.json and the report.
    count
        Number of matches, for the sandbox manifests.
    profiles
        Folder with the published SOTOPIA profiles, for the sotopia manifests.
    seed
        Of the matches.
    temperature
        Of the systems and partners.
    greedy
        Play the systems greedily as well.
    max_tokens
        Longest reply.
    resume
        Go on with what is there; --no-resume refuses a folder that holds results.
    retry_failed
        Play failed episodes again.
    config
        YAML file with any of the settings below.
    """
    from sotopia_rl import evaluate as comparing
    from sotopia_rl.report import ReportInput, results_table, write_report

    chosen = resolve(settings, config)
    systems = named_systems(system)
    if not resume and (output / "results.json").exists():
        raise ConfigError(f"{output}: holds results; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    frozen = named_manifest(manifest, count=count, profiles=profiles, seed=seed)
    frozen.save(output / "manifest.json")
    partners = [AgentSpec(model=name, sampling=Sampling(temperature=temperature)) for name in partner]
    played = []
    for name, model in systems.items():
        specs = stages.system_specs(model, temperature=temperature, greedy=greedy, max_tokens=max_tokens)
        pairings = [p for spec in specs for p in evaluation_pairings(frozen, spec, partners)]
        with closing(open_store(output / f"{name}.db")) as store, bars() as watch:
            with_models(
                limits,
                lambda pool, store=store, pairings=pairings, name=name, watch=watch: stages.play_and_judge(  # type: ignore[misc]
                    pool,
                    store,
                    pairings,
                    judge,
                    tag=name,
                    simulate=chosen,
                    judging=JudgeConfig(),
                    watch=watch,
                    retry_failed=retry_failed,
                ),
            )
            played.append(stages.load_played(name, frozen, store, judge))
    first, *others = systems
    results = comparing.evaluate(played, [(other, first) for other in others], partners=tuple(partner))
    results.save(output / "results.json")
    write_report(ReportInput(results=results, title=frozen.name), output)
    out.print(results_table(results))
    out.print(f"results {output / 'results.json'}\nreport  {output / 'report.html'}")


def named_systems(texts: list[str]) -> dict[str, str]:
    """Model strings by name, from NAME=MODEL.

    Raises:
        ConfigError: Fewer than two, a name twice, or no name.
    """
    pairs = [text.partition("=") for text in texts]
    if any(not (name and equals and model) for name, equals, model in pairs):
        raise ConfigError("--system takes NAME=MODEL, for instance --system sft=local/models/base:runs/sft/adapter")
    systems = {name: model for name, _, model in pairs}
    if len(systems) < len(pairs) or len(systems) < 2:
        raise ConfigError(f"{len(pairs)} systems with {len(systems)} different names; give two or more")
    return systems


def report(run: Path, /, *, stages: Path | None = None) -> None:
    """Write the report of a run folder again and show its table.

    Parameters
    ----------
    run
        Run folder of `sotopia-rl run` or `quickstart`.
    stages
        Folder of finished stages, where the run used another one than its own.
    """
    from sotopia_rl.commands.experiments import execute
    from sotopia_rl.experiment import Experiment

    file = run / "experiment.yaml"
    execute(parse_config(Experiment, read_yaml(file), where=str(file)), run, stages, resume=True, only_report=True)
