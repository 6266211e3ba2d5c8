"""What each stage of an experiment does: reads the folders of its inputs, writes its own.

Every step can be killed and called again on the same folder. The work itself is in `stages.py` and `train/`;
here it is only fed and its results are put in place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

from sotopia_rl import profiles, sandbox, stages
from sotopia_rl.attribute import COMPUTED, METHODS
from sotopia_rl.dataset import sft_rows, write_provenance, write_rows
from sotopia_rl.episode import (
    AgentSpec,
    Episode,
    EpisodeStatus,
    Match,
    Rating,
    Sampling,
    other,
)
from sotopia_rl.errors import DataError
from sotopia_rl.evaluate import evaluate
from sotopia_rl.experiment import Experiment, WorldConfig
from sotopia_rl.files import read_text, write_text
from sotopia_rl.llm.limits import Budget, ModelLimits
from sotopia_rl.llm.open import ModelPool, with_models
from sotopia_rl.manifest import Manifest, evaluation_pairings, load_manifest, seated
from sotopia_rl.monitor import Monitor, secret_leaks
from sotopia_rl.reward import Credited
from sotopia_rl.simulate import Pairing, SimulateConfig
from sotopia_rl.store import EVERYTHING, EpisodeQuery, EpisodeStore, open_store
from sotopia_rl.tally import StepWatch, Tally, Watch, step_watch

logger = logging.getLogger(__name__)

T = TypeVar("T")
Inputs = Mapping[str, Path]
"""Folders of a step's inputs, by the names that `pipeline.py` gives them."""

COMPLETED = EpisodeQuery(status="completed")
STATUSES: tuple[EpisodeStatus, ...] = get_args(EpisodeStatus)


@dataclass(frozen=True)
class Run:
    """What the steps of one run share.

    Attributes:
        watch: Is told of progress.
        limits: What calls to models may take.
        budget: What they may cost, over all steps.
        retry_failed: Play again what failed.
    """

    watch: Watch
    limits: ModelLimits
    budget: Budget
    retry_failed: bool = False

    def with_models(self, work: Callable[[ModelPool], Awaitable[T]]) -> T:
        """Run `work` with a pool of models."""
        return with_models(self.limits, work, budget=self.budget)


def _steps(run: Run, stage: str) -> StepWatch:
    return step_watch(stage, run.watch)


@contextmanager
def stage_store(folder: Path) -> Iterator[EpisodeStore]:
    """The store in a stage's folder."""
    with closing(open_store(folder / "store.db")) as store:
        yield store


def has_failures(folder: Path) -> bool:
    """Whether something failed in a stage's folder: an episode, a judgement, an attribution."""
    if not (folder / "store.db").is_file():
        return False
    with stage_store(folder) as store:
        return store.count(EVERYTHING) > store.count(COMPLETED) or any(True for _ in store.failures())


# --- data --------------------------------------------------------------------------------------------------------


def matches_of(world: WorldConfig) -> tuple[list[Match], list[Match], list[Match]]:
    """Training, validation and held-out matches, with no scenario in common."""
    if world.profiles is not None:
        return profiles.split_matches(
            world.profiles,
            train=world.train_matches,
            validation=world.validation_matches,
            held_out=world.held_out_matches,
            seed=world.seed,
        )
    families = world.families or sandbox.FAMILIES
    train, validation = sandbox.apart_matches(
        "train", world.train_matches, world.validation_matches, seed=world.seed, families=families
    )
    return train, validation, sandbox.matches("held_out", world.held_out_matches, seed=world.seed, families=families)


def world(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    train, validation, held_out = matches_of(e.world)
    Manifest(name=f"{e.name}-train", matches=tuple(train)).save(out / "train.json")
    Manifest(name=f"{e.name}-held-out", matches=tuple(held_out)).save(out / "held_out.json")
    if validation:
        Manifest(name=f"{e.name}-validation", matches=tuple(validation)).save(out / "validation.json")


def simulate(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    matches = load_manifest(inputs["world"] / "train.json").matches
    pairings = stages.cast_pairings(matches, e.cast.speakers, sampling=e.cast.sampling, seed=e.cast.seed)
    _play(run, out, pairings, tag="train", rules=e.simulate)


def _play(run: Run, out: Path, pairings: Sequence[Pairing], *, tag: str, rules: SimulateConfig) -> None:
    """Raises `DataError` where no episode comes to its end: there is nothing to go on with."""
    with stage_store(out) as store:
        tally = run.with_models(
            lambda pool: stages.simulate_into(
                store, pairings, pool.get, tag=tag, config=rules, watch=run.watch, retry_failed=run.retry_failed
            )
        )
        _settle(tally)
        if not store.count(COMPLETED):
            raise DataError(f"none of the {len(pairings)} episodes was completed; see {out / 'store.db'}")


def _settle(tally: Tally, *, some: bool = True) -> None:
    """Say what failed; raise where the stage cannot count as finished."""
    tally.require(some=some and not tally.skipped)
    for kind, message in tally.messages.items():
        logger.warning("%s of %s %s failed (%s): %s", tally.failed[kind], tally.total, tally.stage, kind, message)


def judge(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    with stage_store(inputs["simulate"]) as episodes, stage_store(out) as ratings:
        tally = run.with_models(
            lambda pool: stages.judge_into(
                episodes,
                ratings,
                COMPLETED,
                pool.get(e.judge_model),
                config=e.judge,
                limit=e.concurrency,
                watch=run.watch,
            ),
        )
    _settle(tally)


SOURCES = (("simulate", "judge", "annotate"), ("explore", "explore judge", "explore annotate"))
"""Inputs that training episodes come from: who played them, who rated them, who attributed the scores."""


def rated(e: Experiment, inputs: Inputs) -> Iterator[tuple[Episode, Rating]]:
    """Training episodes with their rating; one that could not be judged is left out (its failure is stored)."""
    for played, judged, _ in SOURCES:
        if played in inputs:
            yield from _rated_in(e, inputs[played], inputs[judged])


def _rated_in(e: Experiment, played: Path, judged: Path) -> Iterator[tuple[Episode, Rating]]:
    with stage_store(played) as episodes, stage_store(judged) as ratings:
        for episode in episodes.episodes(COMPLETED):
            for rating in ratings.ratings(episode.id, judge=e.judge_model):
                yield episode, rating


def _credited(e: Experiment, inputs: Inputs) -> Iterator[Credited]:
    """Rated episodes with the attributions of their scores."""
    annotator = e.annotator_model if METHODS[e.annotate.method].asks else COMPUTED
    for played, judged, attributed in SOURCES:
        if played in inputs:
            with stage_store(inputs[attributed]) as store:
                pairs = _rated_in(e, inputs[played], inputs[judged])
                yield from stages.credited(pairs, store, method=e.annotate.label, annotator=annotator)


def annotate(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    with stage_store(inputs["judge"]) as ratings:
        total = len(ratings.rated_ids(e.judge_model))
    with stage_store(out) as store:
        tally = run.with_models(
            lambda pool: stages.annotate_into(
                rated(e, inputs),
                store,
                pool.get(e.annotator_model) if METHODS[e.annotate.method].asks else None,
                total=total,
                config=e.annotate,
                limit=e.concurrency,
                watch=run.watch,
            ),
        )
    _settle(tally)


def reward(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    if e.reward.granularity == "episode":
        stages.reward_into(lambda: (Credited(*pair) for pair in rated(e, inputs)), out, e.reward)
    else:
        stages.reward_into(lambda: _credited(e, inputs), out, e.reward)


def clone(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    left_out = stages.cloning_rows_into(lambda: rated(e, inputs), out / "sft.jsonl", e.cloning)
    write_text(out / "left_out.json", json.dumps(left_out, indent=1))
    write_provenance(out, judge=e.judge_model)


def rows(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    rewards = stages.read_rewards(inputs["reward"] / "rewards.jsonl")
    stages.reward_rows_into(rated(e, inputs), rewards, out / "reward.jsonl")
    annotator = e.annotator_model if METHODS[e.annotate.method].asks else COMPUTED
    write_provenance(out, judge=e.judge_model, annotator=annotator, attribution=e.annotate.label)


# --- models ------------------------------------------------------------------------------------------------------
# torch is imported by the steps that need it, so that the rest of an experiment runs without it


def base(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    from sotopia_rl.llm.open import resolve_model_folder  # noqa: PLC0415
    from sotopia_rl.train.tiny import train_base  # noqa: PLC0415

    if e.base.path is None:
        text = out / "text.jsonl"
        with stage_store(inputs["simulate"]) as episodes:
            write_rows((row for episode in episodes.episodes(COMPLETED) for row in sft_rows(episode)), text)
        model = train_base(text, e.base.tiny, out / "run", resume=True, progress=_steps(run, "base"))
    else:
        model = resolve_model_folder(e.base.path)
    write_text(out / "model.json", json.dumps({"path": str(model.resolve())}))


def base_folder(inputs: Inputs) -> Path:
    """Where the base model lies."""
    return Path(json.loads(read_text(inputs["base"] / "model.json"))["path"])


def sft(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    from sotopia_rl.train.sft import train_sft  # noqa: PLC0415

    train_sft(inputs["clone"] / "sft.jsonl", base_folder(inputs), e.sft, out, resume=True, progress=_steps(run, "sft"))


def explore(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    """The SFT policy in its seat of training matches, against the cast."""
    matches = load_manifest(inputs["world"] / "train.json").matches[: e.explore.matches]
    policy = AgentSpec(
        model=f"local/{base_folder(inputs)}:{(inputs['sft'] / 'adapter').resolve()}",
        sampling=Sampling(temperature=e.explore.temperature, max_tokens=e.explore.max_tokens),
    )
    cast = stages.cast_pairings(matches, e.cast.speakers, sampling=e.cast.sampling, seed=e.cast.seed)
    pairings = [seated(p.match, policy, p.agents[other(p.match.seat)]) for p in cast]
    _play(run, out, pairings, tag="explore", rules=_panel_rules(e))


def rm(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    from sotopia_rl.train.reward_model import train_reward_model  # noqa: PLC0415

    train_reward_model(
        inputs["rows"] / "reward.jsonl", base_folder(inputs), e.rm, out, resume=True, progress=_steps(run, "rm")
    )


def grpo(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    from sotopia_rl.train.grpo import train_grpo  # noqa: PLC0415

    validation = inputs["world"] / "validation.json"
    with ExitStack() as stack:
        stores = [stack.enter_context(stage_store(inputs[played])) for played, _, _ in SOURCES if played in inputs]
        train_grpo(
            inputs["rows"] / "reward.jsonl",
            base_folder(inputs),
            inputs["sft"] / "adapter",
            inputs["rm"] / "adapter",
            e.grpo,
            out,
            resume=True,
            progress=_steps(run, "grpo"),
            eval_hook=_monitor(run, e, validation).hook(out) if validation.is_file() else None,
            leaks_secret=secret_leaks(stores) if e.world.source == "sandbox" else None,
        )


def _monitor(run: Run, e: Experiment, manifest: Path) -> Monitor:
    """The judge's look at a policy in training."""
    return Monitor(
        matches=load_manifest(manifest).matches,
        partners=_partners(e),
        judge=e.judge_model,
        sampling=Sampling(temperature=e.evaluate.temperature, max_tokens=e.evaluate.max_tokens),
        simulate=_panel_rules(e),
        judging=e.judge,
        limits=run.limits,
        budget=run.budget,
    )


# --- evaluation --------------------------------------------------------------------------------------------------


def _partners(e: Experiment) -> list[AgentSpec]:
    sampling = Sampling(temperature=e.cast.temperature, max_tokens=e.cast.max_tokens)
    return [AgentSpec(model=name, sampling=sampling) for name in e.evaluate.partners]


def _panel_rules(e: Experiment) -> SimulateConfig:
    return e.simulate.model_copy(update={"constrain": e.evaluate.constrain})


def play(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    manifest = load_manifest(inputs["world"] / "held_out.json")
    model = f"local/{base_folder(inputs)}"
    if "adapter" in inputs:
        model += f":{(inputs['adapter'] / 'adapter').resolve()}"
    panel = e.evaluate
    systems = stages.system_specs(
        model, temperature=panel.temperature, greedy=panel.greedy, max_tokens=panel.max_tokens
    )
    pairings = [pairing for system in systems for pairing in evaluation_pairings(manifest, system, _partners(e))]

    with stage_store(out) as store:
        tallies = run.with_models(
            lambda pool: stages.play_and_judge(
                pool,
                store,
                pairings,
                e.judge_model,
                tag="held-out",
                simulate=_panel_rules(e),
                judging=e.judge,
                watch=run.watch,
                retry_failed=run.retry_failed,
            ),
        )
    played, judged = tallies
    _settle(played, some=False)  # what a system fails at is part of its result
    _settle(judged)


def compare(run: Run, e: Experiment, out: Path, inputs: Inputs) -> None:
    manifest = load_manifest(inputs["world"] / "held_out.json")
    arms = list(e.arms)
    pairs = [("sft", "base"), *((arm, "sft") for arm in arms), *((arms[0], arm) for arm in arms[1:])]
    played = []
    for system in ("base", "sft", *arms):
        with stage_store(inputs[system]) as store:
            played.append(stages.load_played(system, manifest, store, e.judge_model))
    results = evaluate(played, pairs, partners=e.evaluate.partners, seeds={"experiment": e.seed}, notes=e.notes)
    results.save(out / "results.json")
