"""What each stage does, on explicit stores and files: the commands and the experiment runner both call these.

Every function here can be stopped at any point and called again: it asks its target what is there already
and goes on from that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from sotopia_rl.attribute import AttributionConfig, annotator_name, attribute_all
from sotopia_rl.dataset import CloningFilter, Judged, reward_rows, select_for_cloning, sft_rows, write_rows
from sotopia_rl.episode import (
    AgentSpec,
    Attribution,
    Episode,
    Failure,
    Match,
    Rating,
    Sampling,
    Usage,
    UtteranceReward,
    other,
)
from sotopia_rl.errors import DataError
from sotopia_rl.files import read_text, write_lines, write_text
from sotopia_rl.judge import JudgeConfig, judge_all
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.manifest import Manifest
from sotopia_rl.models import ChatModel
from sotopia_rl.reward import Credited, Normaliser, RewardConfig, fit_normaliser, utterance_rewards
from sotopia_rl.simulate import Pairing, SimulateConfig, episode_id, simulate
from sotopia_rl.store import EpisodeQuery, EpisodeStore
from sotopia_rl.store.interface import episode_of
from sotopia_rl.store.readable import Unreadable, readable_episodes
from sotopia_rl.tally import Tally, Watch

if TYPE_CHECKING:
    from sotopia_rl.evaluate import Played


GetModel = Callable[[str], ChatModel]


def cast_pairings(
    matches: Iterable[Match], speakers: Mapping[str, float], *, sampling: Sampling, seed: int
) -> list[Pairing]:
    """Seat a speaker drawn by weight in each seat of each match."""
    names, weights = list(speakers), list(speakers.values())
    pairings = []
    for match in matches:
        first, second = random.Random(f"{seed}/{match.id}").choices(names, weights, k=2)
        agents = (AgentSpec(model=first, sampling=sampling), AgentSpec(model=second, sampling=sampling))
        pairings.append(Pairing(match=match, agents=agents))
    return pairings


async def simulate_into(
    store: EpisodeStore,
    pairings: Sequence[Pairing],
    get_model: GetModel,
    *,
    tag: str,
    config: SimulateConfig,
    watch: Watch,
    retry_failed: bool = False,
) -> Tally:
    """Play the pairings that the store lacks and add each episode as it ends, failed ones included."""
    present = played_ids(store, tag, retry_failed=retry_failed)
    missing = [p for p in pairings if episode_id(p, tag=tag, config=config) not in present]
    tally = Tally("episodes", total=len(missing), skipped=len(pairings) - len(missing))
    watch(tally)
    async with aclosing(simulate(missing, get_model, tag=tag, config=config)) as episodes:
        async for episode in episodes:
            store.add_episode(episode)
            tally.add(episode.failure, episode.usage)
            watch(tally)
    return tally


def played_ids(store: EpisodeStore, tag: str, *, retry_failed: bool = False) -> set[str]:
    """Episodes that need not be played: all but those that were cancelled, or only the completed ones."""
    if retry_failed:
        return set(store.ids(EpisodeQuery(tag=tag, status="completed")))
    return set(store.ids(EpisodeQuery(tag=tag))) - set(store.ids(EpisodeQuery(tag=tag, status="cancelled")))


async def judge_into(
    episodes: EpisodeStore,
    target: EpisodeStore,
    query: EpisodeQuery,
    judge: ChatModel,
    *,
    config: JudgeConfig,
    limit: int,
    watch: Watch,
    again: bool = False,
) -> Tally:
    """Rate the episodes that `target` holds no rating of by this judge; failures go beside the ratings.

    Args:
        again: Rate them all, whatever is there.
    """
    rated = set() if again else target.rated_ids(judge.name)
    meant = episodes.ids(query)
    todo = [e for e in meant if e not in rated]
    tally = Tally("judgements", total=len(todo), skipped=len(meant) - len(todo))
    watch(tally)
    target.delete_failures("judge", [f"{e}/{judge.name}" for e in todo])
    last = Failure(kind="cancelled", message="stopped")

    def failed(episode_id: str, failure: Failure) -> None:
        target.add_failure("judge", f"{episode_id}/{judge.name}", failure)
        tally.add(failure, failure.usage)

    def source() -> Iterator[Episode]:
        for found in readable_episodes(episodes, todo):
            if isinstance(found, Unreadable):
                failed(found.episode_id, found.failure)
            else:
                yield found

    async for episode, outcome in judge_all(source(), judge, config, limit=limit):
        if isinstance(outcome, Failure):
            last = outcome
            failed(episode.id, outcome)
        else:
            target.add_rating(outcome)
            tally.add(None, outcome.provenance.usage)
        watch(tally)
    if tally.done < tally.total:
        tally.stopped = last.message
    return tally


async def play_and_judge(
    pool: ModelPool,
    store: EpisodeStore,
    pairings: Sequence[Pairing],
    judge: str | None,
    *,
    tag: str,
    simulate: SimulateConfig,
    judging: JudgeConfig,
    watch: Watch,
    retry_failed: bool = False,
) -> list[Tally]:
    """Play what the store lacks and, where a judge is given, rate what it has no rating of; a tally of each.

    Every model string is opened first, so that a wrong one is found before the first match.
    """
    pool.open({agent.model for pairing in pairings for agent in pairing.agents} | ({judge} if judge else set()))
    played = await simulate_into(
        store, pairings, pool.get, tag=tag, config=simulate, watch=watch, retry_failed=retry_failed
    )
    if judge is None:
        return [played]
    query, limit = EpisodeQuery(tag=tag, status="completed"), simulate.concurrency
    return [played, await judge_into(store, store, query, pool.get(judge), config=judging, limit=limit, watch=watch)]


async def annotate_into(
    rated: Iterable[tuple[Episode, Rating] | Unreadable],
    target: EpisodeStore,
    annotator: ChatModel | None,
    *,
    total: int,
    config: AttributionConfig,
    limit: int,
    watch: Watch,
    again: bool = False,
) -> Tally:
    """Attribute the scores of both agents of every rated episode, leaving out what `target` holds already.

    Args:
        rated: What cannot be read is counted as failed.
        total: Number of rated episodes, for the progress bar.
        again: Leave nothing out.
    """
    name = annotator_name(annotator, config)
    present = set() if again else target.attributed(method=config.label, annotator=name)
    tally = Tally("attributions", total=2 * total * len(config.groups))
    watch(tally)
    last, all_tried = Failure(kind="cancelled", message="stopped"), False

    def item_id(episode_id: str, seat: int, dimensions: Sequence[str]) -> str:
        return f"{episode_id}/{seat}/{','.join(dimensions)}/{config.label}/{name}"

    def failed(item: str, failure: Failure) -> None:
        target.add_failure("annotate", item, failure)
        tally.add(failure, failure.usage)

    def source() -> Iterator[tuple[Episode, Rating]]:
        nonlocal all_tried
        for found in rated:
            if isinstance(found, Unreadable):
                for seat, dimensions in product((0, 1), config.groups):
                    failed(item_id(found.episode_id, seat, dimensions), found.failure)
            else:
                yield found
        all_tried = True

    outcomes = attribute_all(source(), annotator, config, limit=limit, done=lambda key: key[:3] in present)
    async for item, outcome in outcomes:
        key = item_id(item.episode.id, item.seat, item.dimensions)
        if isinstance(outcome, Failure):
            last = outcome
            failed(key, outcome)
        else:
            target.add_attributions(outcome)
            target.delete_failures("annotate", [key])
            tally.add(None, sum((a.provenance.usage for a in outcome), Usage()))
        watch(tally)
    if all_tried:
        tally.skipped = tally.total - tally.done
    else:
        tally.stopped = last.message
    return tally


def credited(
    rated: Iterable[tuple[Episode, Rating]], attributions: EpisodeStore, *, method: str, annotator: str | None
) -> Iterator[Credited]:
    """Each rated episode with its attributions by one method and, where several annotated, one annotator.

    An episode whose annotation failed has none and gets no rewards.
    """
    for episode, rating in rated:
        own = attributions.attributions(episode.id, method=method, annotator=annotator)
        yield Credited(episode, rating, tuple(own))


def reward_into(
    data: Callable[[], Iterable[Credited]], folder: Path, config: RewardConfig, fitted: Path | None = None
) -> Normaliser:
    """Write `normaliser.json` and `rewards.jsonl` into `folder`.

    Args:
        data: Read twice, or once where a normaliser is given.
        fitted: normaliser.json of earlier data, used unchanged.

    Raises:
        DataError: `fitted` is no normaliser, or there is nothing to fit on.
    """
    normaliser = fit_normaliser(data(), config) if fitted is None else read_normaliser(fitted)
    write_text(folder / "normaliser.json", normaliser.model_dump_json(indent=1))
    lines = (r.model_dump_json() + "\n" for item in data() for r in utterance_rewards(item, config, normaliser))
    write_lines(folder / "rewards.jsonl", lines)
    return normaliser


def read_normaliser(path: Path) -> Normaliser:
    """Raises DataError where the file holds none."""
    try:
        return Normaliser.model_validate_json(read_text(path))
    except ValidationError as error:
        raise DataError(f"{path}: not a normaliser ({error.errors()[0]['msg']})") from error


def read_rewards(path: Path) -> dict[str, list[UtteranceReward]]:
    """Rewards by episode id.

    Raises:
        DataError: The file is missing, or a line of it is no reward.
    """
    rewards: dict[str, list[UtteranceReward]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            reward = UtteranceReward.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{path}:{number}: not a reward ({error.errors()[0]['msg']})") from error
        rewards.setdefault(reward.episode_id, []).append(reward)
    return rewards


def cloning_rows_into(
    rated: Callable[[], Iterable[tuple[Episode, Rating]]], path: Path, cloning: CloningFilter
) -> dict[str, int]:
    """Write the rows of the agents worth imitating (`rated` is read twice); how many were left out, by reason.

    Raises:
        DataError: Nobody is left to imitate.
    """
    selection = select_for_cloning((Judged.of(e, r) for e, r in rated()), cloning)
    chosen = (row for e, _ in rated() if e.id in selection.seats for row in sft_rows(e, selection.seats[e.id]))
    if not write_rows(chosen, path):
        raise DataError(f"no agent is left to imitate: {dict(selection.left_out)}; loosen the cloning filter")
    return dict(selection.left_out)


def reward_rows_into(
    rated: Iterable[tuple[Episode, Rating]], rewards: Mapping[str, Sequence[UtteranceReward]], path: Path
) -> int:
    """Write a row per rewarded utterance: the reward model's data, and GRPO's prompts.

    Raises:
        DataError: There is none.
    """
    count = write_rows((row for e, _ in rated for row in reward_rows(e, rewards.get(e.id, ()))), path)
    if not count:
        raise DataError("no utterance has a reward: there is nothing to train on")
    return count


def system_specs(model: str, *, temperature: float, greedy: bool, max_tokens: int) -> list[AgentSpec]:
    """A system as it is evaluated: sampled, and greedily if asked."""
    temperatures = [temperature, 0.0] if greedy else [temperature]
    return [AgentSpec(model=model, sampling=Sampling(temperature=t, max_tokens=max_tokens)) for t in temperatures]


def load_played(system: str, manifest: Manifest, store: EpisodeStore, judge: str) -> Played:
    """What a system did over a manifest, from the store it was played and judged into."""
    from sotopia_rl.evaluate import Played  # noqa: PLC0415 - scipy: 65 MB and a second that playing does not need

    failures = {episode_of(item): failure for _, item, failure in store.failures("judge")}
    ratings = {rating.episode_id: rating for rating in store.ratings(judge=judge)}
    return Played(system, manifest, list(store.episodes()), ratings, failures)


RatedEpisode = tuple[Episode, Rating]


def contrasting_pairs(before: EpisodeStore, after: EpisodeStore, judge: str, *, count: int) -> list[RatedEpisode]:
    """Matches that two systems played, from the largest gain in goal score to the largest loss, evenly spread.

    Returns:
        For each of at most `count` matches the episode of `before`, then that of `after`. Greedy episodes where
        both have them, since those show the policies without their noise.
    """
    old, new = _by_pair(before, judge), _by_pair(after, judge)
    shared = sorted(old.keys() & new.keys())
    greedy = [key for key in shared if key[-1] == 0.0]
    ranked = sorted(greedy or shared, key=lambda key: (_goal(old[key]) - _goal(new[key]), key))
    if not ranked or not count:
        return []
    places = {round(i * (len(ranked) - 1) / max(1, count - 1)) for i in range(count)}
    return [episode for place in sorted(places) for episode in (old[ranked[place]], new[ranked[place]])]


def _by_pair(store: EpisodeStore, judge: str) -> dict[tuple[str, str, float], RatedEpisode]:
    """Rated episodes by match, partner and the tested system's temperature."""
    found = {}
    for episode, rating in store.rated(EpisodeQuery(status="completed"), judge=judge):
        seat = episode.match.seat
        key = (episode.match.id, episode.agents[other(seat)].model, episode.agents[seat].sampling.temperature)
        found[key] = (episode, rating)
    return found


def _goal(rated: RatedEpisode) -> float:
    episode, rating = rated
    return rating.points(episode.match.seat).get("goal", 0.0)


async def reward_shown(
    rated: Sequence[RatedEpisode],
    annotator: ChatModel | None,
    *,
    annotate: AttributionConfig,
    reward: RewardConfig,
    normaliser: Normaliser,
    limit: int,
) -> list[tuple[Episode, Rating, list[UtteranceReward]]]:
    """Attribute and reward some episodes as the training data was; one that cannot be has no rewards."""
    found: dict[str, list[Attribution]] = {episode.id: [] for episode, _ in rated}
    if reward.granularity == "utterance":
        async for item, outcome in attribute_all(rated, annotator, annotate, limit=limit):
            if not isinstance(outcome, Failure):
                found[item.episode.id] += outcome
    shown = []
    for episode, rating in rated:
        credit = Credited(episode, rating, tuple(found[episode.id]))
        shown.append((episode, rating, utterance_rewards(credit, reward, normaliser)))
    return shown
