"""What the judge, not the reward model, says of a policy while it trains.

A few matches that are neither trained on nor part of the final evaluation are played by the policy as it
stands, and judged. The episodes are kept, so a look at them shows how the policy changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from sotopia_rl import sandbox
from sotopia_rl.dataset import PromptRow
from sotopia_rl.episode import AgentSpec, Match, Sampling
from sotopia_rl.evaluate import metrics_of
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.models import ChatModel
from sotopia_rl.simulate import Pairing, SimulateConfig, parse_action
from sotopia_rl.stages import play_and_judge
from sotopia_rl.store import EpisodeQuery, EpisodeStore

CURVES = ("goal", "overall", "believability", "words_per_utterance", "secret_leaks")
"""Metrics of the final evaluation that are followed during training, where the judge gives them."""


def validation_pairings(matches: Sequence[Match], system: AgentSpec, partners: Sequence[AgentSpec]) -> list[Pairing]:
    """Each match once, the partners taking turns: a curve needs many matches more than every combination."""
    agents = [(system, partners[number % len(partners)]) for number in range(len(matches))]
    return [
        Pairing(match=match, agents=pair if match.seat == 0 else (pair[1], pair[0]))
        for match, pair in zip(matches, agents, strict=True)
    ]


async def judge_policy(
    policy: ChatModel,
    pool: ModelPool,
    store: EpisodeStore,
    matches: Sequence[Match],
    *,
    partners: Sequence[AgentSpec],
    judge: str,
    sampling: Sampling,
    simulate: SimulateConfig,
    judging: JudgeConfig,
) -> dict[str, float]:
    """Mean metrics of the policy over the validation matches, into the curves of a training run.

    Args:
        policy: Added to the pool under its own name, which is also the tag of its episodes.
        store: Keeps the episodes; what is there already is not played again.

    Returns:
        `score` (mean goal score in points, or the overall score where no goal is judged), the means of
        `CURVES`, and `judge_failed`, the share of matches without a score. Only that share where none has one.
    """
    pool.add(policy)
    system = AgentSpec(model=policy.name, sampling=sampling)
    await play_and_judge(
        pool,
        store,
        validation_pairings(matches, system, partners),
        judge,
        tag=policy.name,
        simulate=simulate,
        judging=judging,
        watch=lambda _: None,
    )
    found = [
        metrics_of(episode, rating, episode.match.seat)
        for episode, rating in store.rated(EpisodeQuery(tag=policy.name, status="completed"), judge=judge)
    ]
    means = {name: fmean(m[name] for m in found) for name in CURVES if found and all(name in m for m in found)}
    score = {"score": means.get("goal", means["overall"])} if means else {}
    return score | means | {"judge_failed": 1 - len(found) / len(matches)}


def secret_leaks(store: EpisodeStore) -> Callable[[PromptRow, str], bool]:
    """Whether a reply to a row gives its speaker's limit or secret away; exact in the offline world.

    Args:
        store: Holds the episodes that the rows come from. A row of a scenario from elsewhere leaks nothing that
            could be computed: ask only for the offline world's.
    """

    def leaks(row: PromptRow, text: str) -> bool:
        try:
            action = parse_action(text)
        except ValueError:  # what nobody can read gives nothing away
            return False
        episode = store.episode(row.episode_id)
        return sandbox.gives_away(episode.match, episode.turns[: row.turn], row.seat, action)

    return leaks
