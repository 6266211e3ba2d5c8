"""`simulate`, `judge`, `annotate` and `reward`: from matches to training rows, over an episode store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile

from sotopia_rl import stages
from sotopia_rl.attribute import METHODS, AttributionConfig
from sotopia_rl.commands.options import DEFAULT_STORE, finish, named_manifest, resolve
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
    tag: str,
    judge: str | None = None,
    store: str = DEFAULT_STORE,
    count: int = 40,
    profiles: Path | None = None,
    seed: int = 0,
    temperature: float = 0.7,
    max_tokens: int = 512,
    retry_failed: bool = False,
    resume: bool = True,
    config: ExistingFile | None = None,
    settings: Annotated[SimulateConfig, Parameter(name="*")] = SimulateConfig(),  # noqa: B008  frozen
    limits: Annotated[ModelLimits, Parameter(name="*")] = ModelLimits(),  # noqa: B008  frozen
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
    count
        Number of matches, for the sandbox manifests.
    profiles
        Folder with the published SOTOPIA profiles, for the sotopia manifests.
    seed
        Of the matches.
    temperature
        Of both agents; 0 is greedy.
    max_tokens
        Longest reply of an agent.
    retry_failed
        Play failed episodes of this tag again.
    resume
        Go on with the episodes of this tag; --no-resume refuses a tag that has any.
    config
        YAML file with any of the settings below.
    """
    chosen = resolve(settings, config)
    frozen = named_manifest(manifest, count=count, profiles=profiles, seed=seed)
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
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
                simulate=chosen,
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
    concurrency: int = 64,
    resume: bool = True,
    config: ExistingFile | None = None,
    settings: Annotated[JudgeConfig, Parameter(name="*")] = JudgeConfig(),  # noqa: B008  frozen
    limits: Annotated[ModelLimits, Parameter(name="*")] = ModelLimits(),  # noqa: B008  frozen
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
    concurrency
        Judgements under way at once.
    resume
        Leave out what this judge has scored; --no-resume scores everything again.
    config
        YAML file with any of the settings below.
    """
    chosen = resolve(settings, config)
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
                config=chosen,
                limit=concurrency,
                watch=watch,
                again=not resume,
            ),
        )
    finish(tally)


def annotate(
    *,
    tag: str,
    annotator: str | None = None,
    judge: str | None = None,
    store: str = DEFAULT_STORE,
    concurrency: int = 64,
    resume: bool = True,
    dry_run: bool = False,
    config: ExistingFile | None = None,
    settings: Annotated[AttributionConfig, Parameter(name="*")] = AttributionConfig(),  # noqa: B008  frozen
    limits: Annotated[ModelLimits, Parameter(name="*")] = ModelLimits(),  # noqa: B008  frozen
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
    concurrency
        Questions under way at once.
    resume
        Leave out what is attributed already; --no-resume asks again.
    dry_run
        Print one full prompt and an estimate of calls, tokens and cost, and ask nobody.
    config
        YAML file with any of the settings below.
    """
    chosen = resolve(settings, config)
    if METHODS[chosen.method].asks and annotator is None:
        raise ConfigError(f"method {chosen.method} asks an annotator; give one with --annotator")
    with closing(open_store(store, create=False)) as episodes:
        query = EpisodeQuery(tag=tag, status="completed")
        judge = the_judge(episodes, query, judge)
        if dry_run:
            from sotopia_rl.attribute.estimate import estimate

            found = readable_rated(episodes, query, judge)
            pairs = (pair for pair in found if not isinstance(pair, Unreadable))
            out.print(estimate(pairs, chosen, annotator, limits), markup=False)
            return
        with bars() as watch:
            tally = with_models(
                limits,
                lambda pool: stages.annotate_into(
                    readable_rated(episodes, query, judge),
                    episodes,
                    pool.get(annotator) if annotator and METHODS[chosen.method].asks else None,
                    total=len(episodes.rated_ids(judge).intersection(episodes.ids(query))),
                    config=chosen,
                    limit=concurrency,
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
    config: ExistingFile | None = None,
    settings: Annotated[RewardConfig, Parameter(name="*")] = RewardConfig(),  # noqa: B008  frozen
    cloning: Annotated[CloningFilter, Parameter(name="cloning")] = CloningFilter(),  # noqa: B008  frozen
    resume: bool = True,
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
    config
        YAML file with any of the settings below.
    resume
        Write again what is there; --no-resume refuses a folder that holds rewards.
    """
    chosen = resolve(settings, config)
    if not resume and (output / "rewards.jsonl").exists():
        raise DataError(f"{output}: holds rewards; choose another folder")
    query = EpisodeQuery(tag=tag, status="completed")
    with closing(open_store(store, create=False)) as episodes, written_together(output) as folder:
        judge = the_judge(episodes, query, judge)

        def rated() -> Iterator[tuple[Episode, Rating]]:
            return episodes.rated(query, judge=judge)

        def data() -> Iterator[Credited]:
            if chosen.granularity == "episode":
                return (Credited(*pair) for pair in rated())
            return stages.credited(rated(), episodes, method=method, annotator=annotator)

        stages.reward_into(data, folder, chosen, normaliser)
        rewards = stages.read_rewards(folder / "rewards.jsonl")
        stages.cloning_rows_into(rated, folder / "sft.jsonl", cloning)
        count = stages.reward_rows_into(rated(), rewards, folder / "reward.jsonl")
        write_provenance(folder, judge=judge, annotator=annotator, attribution=method)
        if report:
            from sotopia_rl.reward_report import write_reward_report

            out.print(write_reward_report(data(), chosen, folder), markup=False, soft_wrap=True)
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
