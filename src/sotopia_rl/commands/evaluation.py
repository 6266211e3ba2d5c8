"""`evaluate …` and `report`: which of several systems does better, how sure that is, and the page that says so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from cyclopts.types import ExistingDirectory, ExistingFile
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from sotopia_rl.commands.flags import Flags, resolve, unchecked
from sotopia_rl.commands.options import Drawn, Speaking, finish, named_manifest
from sotopia_rl.commands.publish import publish
from sotopia_rl.config import Config, parse_config, read_yaml
from sotopia_rl.console import bars, err, out
from sotopia_rl.errors import ConfigError, EvaluationError
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import with_models
from sotopia_rl.simulate import SimulateConfig

if TYPE_CHECKING:  # scipy takes a second, which `--help` does not need
    from sotopia_rl.llm.open import ModelPool
    from sotopia_rl.tally import Tally, Watch

SECTIONS: dict[type[Config], str] = {JudgeConfig: "judging"}
"""Of a config file."""

app = App(name="evaluate", help="Compare systems over one manifest: play, judge, compare, rank, bundle, verify.")


@app.default
@app.command
def play(
    *,
    manifest: str,
    system: list[str],
    partner: list[str],
    judge: list[str],
    output: Path,
    repeat_judge: PositiveInt = 1,
    greedy: bool = False,
    resume: bool = True,
    retry_failed: bool = False,
    max_cost: PositiveFloat | None = None,
    config: ExistingFile | None = None,
    drawn: Flags[Drawn] = Drawn(),  # noqa: B008  frozen
    speaking: Flags[Speaking] = Speaking(),  # noqa: B008  frozen
    settings: Flags[SimulateConfig] = SimulateConfig(),  # noqa: B008  frozen
    judging: Annotated[Flags[JudgeConfig], Parameter(name="judging")] = JudgeConfig(),  # noqa: B008  frozen
    limits: Flags[ModelLimits] = ModelLimits(),  # noqa: B008  frozen
) -> None:
    """Play every system over one manifest against the same partners, judge, and compare pair by pair.

    Every system is compared with the first one named. The same command again plays and judges only what is missing;
    systems, partners and judges may be added to a folder. Failed episodes are counted; the exit code is 1 where a
    comparison is left without a pair.

    Parameters
    ----------
    manifest
        sandbox-train, sandbox-held-out, a size of sotopia-hard or sotopia-all, or a manifest file; see
        `sotopia-rl manifest list`.
    system
        NAME=MODEL, twice or more; the first is what the others are compared with.
    partner
        Model string of a fixed partner; several make a panel.
    judge
        Model string of a judge; several make a panel: their mean is reported, and each alone.
    output
        Run folder for episodes, results.json and the report.
    repeat_judge
        Times each judge rates an episode. The first rating counts, the others tell how far it agrees with itself.
    greedy
        Play the systems greedily as well.
    resume
        Go on with what is there; --no-resume refuses a folder that holds results.
    retry_failed
        Play failed episodes again.
    max_cost
        Spend cap in USD over all models; --max-spend-usd by another name.
    config
        YAML file with any of the settings below.
    """
    from sotopia_rl.evaluate.folder import Plan, joined_plan
    from sotopia_rl.evaluate.play import play as play_into

    drawn, speaking, settings, judging, limits = resolve(
        config, drawn, speaking, settings, judging, limits, sections=SECTIONS
    )
    if not partner:
        raise ConfigError("a system needs somebody to talk to; name a --partner, or use `sotopia-rl evaluate matrix`")
    if not resume and (output / "results.json").exists():
        raise ConfigError(f"{output}: holds results; choose another folder")
    asked = {
        "systems": named_systems(system),
        "partners": partner,
        "judges": judge,
        **speaking.model_dump(),
        "greedy": greedy,
        "judgements": dict.fromkeys(judge, repeat_judge) if repeat_judge > 1 else {},
        "simulate": settings.model_dump(),
        "judging": judging.model_dump(),
    }
    frozen = named_manifest(manifest, drawn)
    plan = joined_plan(parse_config(Plan, asked, where="evaluate"), frozen, output)
    work_through(
        limits,
        max_cost,
        lambda pool, watch: play_into(pool, output, plan, frozen, watch, retry_failed=retry_failed),
    )
    publish([output], output)


def work_through(
    limits: ModelLimits, max_cost: float | None, work: Callable[[ModelPool, Watch], Awaitable[list[Tally]]]
) -> None:
    """Do `work` behind progress bars, and say what was done; what failed is counted, and left to the results."""
    with bars() as watch:
        tallies = with_models(capped(limits, max_cost), lambda pool: work(pool, watch))
    finish(*tallies, failures="count")


def capped(limits: ModelLimits, max_cost: float | None) -> ModelLimits:
    """Limits with a spend cap."""
    return limits if max_cost is None else ModelLimits(**{**limits.model_dump(), "max_spend_usd": max_cost})


@app.command
def rejudge(
    run: ExistingDirectory,
    /,
    *,
    judge: list[str],
    repeat_judge: PositiveInt = 1,
    max_cost: PositiveFloat | None = None,
    limits: Flags[ModelLimits] = ModelLimits(),  # noqa: B008  frozen
) -> None:
    """Have other judges rate the stored episodes of a run, or the same ones again; nothing is played.

    Parameters
    ----------
    run
        Run folder of `sotopia-rl evaluate`.
    judge
        Model string of a judge: a new one, or one of the run with --repeat-judge; nobody else is asked.
    repeat_judge
        Times the judges named here rate an episode; the first rating counts.
    max_cost
        Spend cap in USD.
    """
    from sotopia_rl.evaluate.folder import Plan, joined_plan, load_plan, save_plan
    from sotopia_rl.evaluate.play import judge as judge_into
    from sotopia_rl.evaluate.play import refuse_silent
    from sotopia_rl.manifest import load_manifest

    (limits,) = resolve(None, limits)
    before = load_plan(run)
    again = dict.fromkeys(judge, repeat_judge) if repeat_judge > 1 else {}
    asked = parse_config(Plan, {**before.model_dump(), "judges": judge, "judgements": again}, where="rejudge")
    manifest = load_manifest(run / "manifest.json")
    plan = joined_plan(asked, manifest, run)

    async def rate(pool: ModelPool, watch: Watch) -> list[Tally]:
        await refuse_silent(pool, judge)
        save_plan(plan, manifest, run)
        return await judge_into(pool, run, plan, watch, judges=judge)

    work_through(limits, max_cost, rate)
    publish([run], run)


@app.command
def compare(
    runs: list[ExistingDirectory],
    /,
    *,
    output: Path | None = None,
    baseline: str | None = None,
    published: bool = False,
    config: ExistingFile | None = None,
    confidence: float | None = None,
    wanted_points: float | None = None,
) -> None:
    """Compare what stored runs played, and write results.json and the report anew; nothing is played or judged.

    Parameters
    ----------
    runs
        Run folders of `sotopia-rl evaluate`; several must have played one manifest before the same judges.
    output
        Folder for the results; the run's own where there is one.
    baseline
        System that the others are compared with; the first by default.
    published
        Set published figures beside one's own, marked as not paired.
    config
        YAML file with settings of the comparison: confidence, num_draws, power, wanted_points, seed.
    confidence
        Level of the intervals.
    wanted_points
        A difference worth finding; the report says how many scenarios would find it.
    """
    from sotopia_rl.results import EvaluateConfig

    if output is None and len(runs) > 1:
        raise ConfigError(f"{len(runs)} runs are compared; give a folder for the results with --output")
    flags = {"confidence": confidence, "wanted_points": wanted_points}
    given = {name: value for name, value in flags.items() if value is not None}
    (settings,) = resolve(config, unchecked(EvaluateConfig, given))
    publish(runs, output or runs[0], config=settings, baseline=baseline, published=published)


@app.command
def matrix(
    *,
    manifest: str,
    system: list[str],
    judge: list[str],
    output: Path,
    metric: str = "goal",
    tie_margin: NonNegativeFloat = 0.0,
    retry_failed: bool = False,
    max_cost: PositiveFloat | None = None,
    config: ExistingFile | None = None,
    drawn: Flags[Drawn] = Drawn(),  # noqa: B008  frozen
    speaking: Flags[Speaking] = Speaking(),  # noqa: B008  frozen
    settings: Flags[SimulateConfig] = SimulateConfig(),  # noqa: B008  frozen
    judging: Annotated[Flags[JudgeConfig], Parameter(name="judging")] = JudgeConfig(),  # noqa: B008  frozen
    limits: Flags[ModelLimits] = ModelLimits(),  # noqa: B008  frozen
) -> None:
    """Let every pair of systems talk to each other, and rank them (Bradley-Terry, with intervals).

    On every board (scenario, characters, seed) each pair plays twice, with the seats changed, and the scores at the
    same seat are compared. The same command again plays only what is missing; systems may be added.

    Parameters
    ----------
    manifest
        As of `sotopia-rl evaluate play`; who is under test in it does not matter here.
    system
        NAME=MODEL, twice or more.
    judge
        Model string of a judge; the mean of several counts.
    output
        Run folder for episodes, matrix.json and the page.
    metric
        What a conversation is won by: a dimension, or overall.
    tie_margin
        Scores that differ by no more than this tie; a tie is half a win for each.
    retry_failed
        Play failed episodes again.
    max_cost
        Spend cap in USD over all models.
    config
        YAML file with any of the settings below.
    """
    from sotopia_rl.evaluate.folder import Plan, joined_plan
    from sotopia_rl.evaluate.matrix import matrix_provenance, matrix_results, play_matrix
    from sotopia_rl.report import matrix_table, write_matrix

    drawn, speaking, settings, judging, limits = resolve(
        config, drawn, speaking, settings, judging, limits, sections=SECTIONS
    )
    asked = {
        "systems": named_systems(system),
        "judges": judge,
        **speaking.model_dump(),
        "simulate": settings.model_dump(),
        "judging": judging.model_dump(),
    }
    frozen = named_manifest(manifest, drawn)
    plan = joined_plan(parse_config(Plan, asked, where="matrix"), frozen, output)
    work_through(
        limits,
        max_cost,
        lambda pool, watch: play_matrix(pool, output, plan, frozen, watch, retry_failed=retry_failed),
    )
    results = matrix_results(output, plan, frozen, metric=metric, tie_margin=tie_margin)
    write_matrix(results, output, provenance=matrix_provenance(output, plan))
    out.print(matrix_table(results))
    out.print(f"results {output / 'matrix.json'}\npage    {output / 'matrix.html'}")


@app.command
def bundle(run: ExistingDirectory, /, *, output: Path, sign: bool = False) -> None:
    """Pack a run into one .zip: matches, episodes, ratings, settings, results, and the hash of each.

    Parameters
    ----------
    run
        Run folder of `sotopia-rl evaluate`.
    output
        The .zip to write.
    sign
        Sign the hashes (HMAC-SHA256) with the key in SOTOPIA_RL_BUNDLE_KEY.
    """
    from sotopia_rl.evaluate.bundle import write_bundle

    contents = write_bundle(run, output, sign=sign)
    signed = ", signed" if sign else ""
    out.print(
        f"{output}: {len(contents.files)} files{signed}, manifest {contents.manifest_sha256[:12]}", soft_wrap=True
    )


@app.command
def verify(bundle: ExistingFile, /) -> None:
    """Check a bundle: every hash, the signature, and every number of its results from its episodes.

    Ends with 1 where anything differs, and names it.

    Parameters
    ----------
    bundle
        A .zip that `sotopia-rl evaluate bundle` made.
    """
    from sotopia_rl.evaluate.bundle import verify_bundle

    verdict = verify_bundle(bundle)
    for problem in verdict.problems[:MAX_PROBLEMS]:
        err.print(f"differs  {problem}", markup=False, soft_wrap=True)
    if (more := len(verdict.problems) - MAX_PROBLEMS) > 0:
        err.print(f"differs  and {more} more", markup=False)
    for note in verdict.notes:
        err.print(f"note     {note}", markup=False, soft_wrap=True)
    if not verdict.holds:
        raise EvaluationError(f"{bundle}: {len(verdict.problems)} of its statements do not hold")
    out.print(
        f"{bundle}: {verdict.num_files} files have their hashes, and all {verdict.num_numbers} values of its results "
        "follow from the episodes. That the named models said these things is not shown by it.",
        markup=False,
    )


MAX_PROBLEMS = 20
"""Shown of what differs."""


def named_systems(texts: list[str], *, at_least: int = 2) -> dict[str, str]:
    """Model strings by name, from NAME=MODEL.

    Raises:
        ConfigError: Fewer than `at_least`, a name twice, or no name.
    """
    pairs = [text.partition("=") for text in texts]
    if any(not (name and equals and model) for name, equals, model in pairs):
        raise ConfigError("--system takes NAME=MODEL, for instance --system sft=local/models/base:runs/sft/adapter")
    systems = {name: model for name, _, model in pairs}
    if len(systems) < len(pairs) or len(systems) < at_least:
        raise ConfigError(f"{len(pairs)} systems with {len(systems)} different names; give {at_least} or more")
    return systems


def report(run: ExistingDirectory, /, *, stages: Path | None = None, published: bool = False) -> None:
    """Write the report of a run folder again and show its table.

    Parameters
    ----------
    run
        Run folder of `sotopia-rl run`, `quickstart` or `evaluate`.
    stages
        Folder of finished stages, where the run used another one than its own.
    published
        Set published figures beside one's own, marked as not paired; for runs of `evaluate`.
    """
    from sotopia_rl.commands.experiments import execute
    from sotopia_rl.experiment import Experiment

    if (run / "evaluation.json").is_file():
        publish([run], run, published=published)
        return
    file = run / "experiment.yaml"
    execute(parse_config(Experiment, read_yaml(file), where=str(file)), run, stages, resume=True, only_report=True)
