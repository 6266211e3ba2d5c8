"""`simulate`, `judge`, `annotate` and `reward`: from matches to training rows, over an episode store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile
from pydantic import Field

from sotopia_rl import stages
from sotopia_rl.attribute import METHODS, AttributionConfig
from sotopia_rl.commands.flags import Flags, resolve
from sotopia_rl.commands.options import DEFAULT_STORE, Drawn, Speaking, finish, named_manifest
from sotopia_rl.config import Config
from sotopia_rl.console import bars, out
from sotopia_rl.dataset import CloningFilter, write_provenance
from sotopia_rl.episode import AgentSpec, Episode, Rating, Sampling
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.files import written_together
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import with_models
from sotopia_rl.manifest import evaluation_pairings
from sotopia_rl.reward import Credited, RewardConfig
from sotopia_rl.simulate import SimulateConfig
from sotopia_rl.store import EpisodeQuery, EpisodeStore, open_store, refuse_empty
from sotopia_rl.store.readable import Unreadable, readable_rated


def simulate(
    *,
    manifest: str,
    agent1: str,
    agent2: str,
    tag: Annotated[str, Field(min_length=1)],
    judge: str | None = None,
    store: str = DEFAULT_STORE,
    retry_failed: bool = False,
    resume: bool = True,
    config: ExistingFile | None = None,
    drawn: Flags[Drawn] = Drawn(),  # noqa: B008  frozen
    speaking: Flags[Speaking] = Speaking(),  # noqa: B008  frozen
    settings: Flags[SimulateConfig] = SimulateConfig(),  # noqa: B008  frozen
    limits: Flags[ModelLimits] = ModelLimits(),  # noqa: B008  frozen
) -> None:
    """Play matches between two models and keep the episodes, failed ones included.

    The same command again plays only what the store lacks.

    Parameters
    ----------
    manifest
        sandbox-train, sandbox-held-out, sotopia-hard, sotopia-all, or a manifest file.
    agent1
        Model string of the agent in the seat that each match names as the one under test.
    agent2
        Model string of its partner.
    tag
        Name of these episodes in the store.
    judge
        Model string of a judge to score them with at once; `sotopia-rl judge` does it later.
    store
        Episode store: FILE.db or redis://HOST:PORT.
    retry_failed
        Play failed episodes of this tag again.
    resume
        Go on with the episodes of this tag; --no-resume refuses a tag that has any.
    config
        YAML file with any of the settings below.
    """
    drawn, speaking, settings, limits = resolve(config, drawn, speaking, settings, limits)
    frozen = named_manifest(manifest, drawn)
    sampling = Sampling(**speaking.model_dump())
    first, second = (AgentSpec(model=name, sampling=sampling) for name in (agent1, agent2))
    pairings = evaluation_pairings(frozen, first, [second])
    with closing(open_store(store)) as episodes, bars() as watch:
        refuse_started(episodes, tag, resume=resume)

        tallies = with_models(
            limits,
            lambda pool: stages.play_and_judge(
                pool,
                episodes,
                pairings,
                judge,
                tag=tag,
                simulate=settings,
                judging=JudgeConfig(),
                watch=watch,
                retry_failed=retry_failed,
            ),
        )
    finish(*tallies)


def judge(
    *,
    tag: str,
    judge: str,
    store: str = DEFAULT_STORE,
    resume: bool = True,
    config: ExistingFile | None = None,
    settings: Flags[JudgeConfig] = JudgeConfig(),  # noqa: B008  frozen
    limits: Flags[ModelLimits] = ModelLimits(),  # noqa: B008  frozen
) -> None:
    """Score completed episodes on SOTOPIA-EVAL's seven dimensions, without simulating them again.

    Several judges may score the same episodes; each keeps its own ratings.

    Parameters
    ----------
    tag
        Which episodes.
    judge
        Model string of the judge.
    store
        Episode store: FILE.db or redis://HOST:PORT.
    resume
        Leave out what this judge has scored; --no-resume scores everything again.
    config
        YAML file with any of the settings below.
    """
    settings, limits = resolve(config, settings, limits)
    query = EpisodeQuery(tag=tag, status="completed")
    with closing(open_store(store, create=False)) as episodes, bars() as watch:
        refuse_empty(episodes, query)
        tally = with_models(
            limits,
            lambda pool: stages.judge_into(
                episodes,
                episodes,
                query,
                pool.get(judge),
                config=settings,
                limit=settings.concurrency,
                watch=watch,
                again=not resume,
            ),
        )
    finish(tally)


class Asking(Config):
    """How an annotator is asked."""

    concurrency: int = Field(default=64, gt=0)
    """Questions under way at once."""


def annotate(
    *,
    tag: str,
    annotator: str | None = None,
    judge: str | None = None,
    store: str = DEFAULT_STORE,
    resume: bool = True,
    dry_run: bool = False,
    config: ExistingFile | None = None,
    asking: Flags[Asking] = Asking(),  # noqa: B008  frozen
    settings: Flags[AttributionConfig] = AttributionConfig(),  # noqa: B008  frozen
    limits: Flags[ModelLimits] = ModelLimits(),  # noqa: B008  frozen
) -> None:
    """Attribute the scores of judged episodes to their utterances.

    Parameters
    ----------
    tag
        Which episodes.
    annotator
        Model string of the annotator; methods that ask nobody (uniform, exact) need none.
    judge
        Whose scores; needed where several judges scored the episodes.
    store
        Episode store: FILE.db or redis://HOST:PORT.
    resume
        Leave out what is attributed already; --no-resume asks again.
    dry_run
        Print one full prompt and an estimate of calls, tokens and cost, and ask nobody.
    config
        YAML file with any of the settings below.
    """
    asking, settings, limits = resolve(config, asking, settings, limits)
    if METHODS[settings.method].asks and annotator is None:
        raise ConfigError(f"method {settings.method} asks an annotator; give one with --annotator")
    with closing(open_store(store, create=False)) as episodes:
        query = EpisodeQuery(tag=tag, status="completed")
        judge = the_judge(episodes, query, judge)
        if dry_run:
            from sotopia_rl.attribute.estimate import estimate

            found = readable_rated(episodes, query, judge)
            pairs = (pair for pair in found if not isinstance(pair, Unreadable))
            out.print(estimate(pairs, settings, annotator, limits), markup=False)
            return
        with bars() as watch:
            tally = with_models(
                limits,
                lambda pool: stages.annotate_into(
                    readable_rated(episodes, query, judge),
                    episodes,
                    pool.get(annotator) if annotator and METHODS[settings.method].asks else None,
                    total=len(episodes.rated_ids(judge).intersection(episodes.ids(query))),
                    config=settings,
                    limit=asking.concurrency,
                    watch=watch,
                    again=not resume,
                ),
            )
    finish(tally)


def reward(
    *,
    tag: str,
    output: Path,
    annotator: str | None = None,
    method: str = "direct",
    judge: str | None = None,
    store: str = DEFAULT_STORE,
    report: bool = False,
    normaliser: ExistingFile | None = None,
    resume: bool = True,
    config: ExistingFile | None = None,
    settings: Flags[RewardConfig] = RewardConfig(),  # noqa: B008  frozen
    cloning: Annotated[Flags[CloningFilter], Parameter(name="cloning")] = CloningFilter(),  # noqa: B008  frozen
) -> None:
    """Combine attributions and scores into one reward per utterance, and write training rows.

    Writes rewards.jsonl, normaliser.json, sft.jsonl (replies worth imitating) and reward.jsonl (replies with
    their rewards; its prompts serve GRPO) into the output folder.

    Parameters
    ----------
    tag
        Which episodes.
    output
        Folder for the files.
    annotator
        Whose attributions; needed where several annotated the episodes.
    method
        Of the attributions, as `sotopia-rl annotate` recorded it.
    judge
        Whose scores; needed where several judges scored the episodes.
    store
        Episode store: FILE.db or redis://HOST:PORT.
    report
        Show distributions per dimension, correlations and examples, and write them as report.html.
    normaliser
        normaliser.json of earlier data, so that the rewards are on the same scale; fitted on this data otherwise.
    resume
        Write again what is there; --no-resume refuses a folder that holds rewards.
    config
        YAML file with any of the settings below.
    """
    settings, cloning = resolve(config, settings, cloning, sections={CloningFilter: "cloning"})
    if not resume and (output / "rewards.jsonl").exists():
        raise DataError(f"{output}: holds rewards; choose another folder")
    query = EpisodeQuery(tag=tag, status="completed")
    with closing(open_store(store, create=False)) as episodes, written_together(output) as folder:
        judge = the_judge(episodes, query, judge)

        def rated() -> Iterator[tuple[Episode, Rating]]:
            return episodes.rated(query, judge=judge)

        def data() -> Iterator[Credited]:
            if settings.granularity == "episode":
                return (Credited(*pair) for pair in rated())
            return stages.credited(rated(), episodes, method=method, annotator=annotator)

        stages.reward_into(data, folder, settings, normaliser)
        rewards = stages.read_rewards(folder / "rewards.jsonl")
        stages.cloning_rows_into(rated, folder / "sft.jsonl", cloning)
        count = stages.reward_rows_into(rated(), rewards, folder / "reward.jsonl")
        write_provenance(folder, judge=judge, annotator=annotator, attribution=method)
        if report:
            from sotopia_rl.reward_report import write_reward_report

            out.print(write_reward_report(data(), settings, folder), markup=False, soft_wrap=True)
    out.print(f"{count} rewarded utterances in {output}")


def refuse_started(store: EpisodeStore, tag: str, *, resume: bool) -> None:
    """Raises ConfigError where the tag has episodes and is not to be resumed."""
    if not resume and (count := store.count(EpisodeQuery(tag=tag))):
        raise ConfigError(f"tag {tag!r} has {count} episodes; choose another tag, or leave --no-resume out")


def the_judge(store: EpisodeStore, query: EpisodeQuery, named: str | None) -> str:
    """The judge whose scores are meant.

    Raises:
        DataError: No episode is rated (by it), or several judges rated them and none is named.
    """
    refuse_empty(store, query)
    meant = set(store.ids(query))
    judges = [judge for judge in store.judges() if meant & store.rated_ids(judge)]
    if not judges or (named is not None and named not in judges):
        raise DataError(
            f"tag {query.tag!r} has no ratings{f' by {named}' if named else ''}; run sotopia-rl judge first"
        )
    if named is None and len(judges) > 1:
        raise DataError(f"tag {query.tag!r} was rated by {', '.join(judges)}; name one with --judge")
    return named or judges[0]
