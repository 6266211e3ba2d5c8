"""What the judge, not the reward model, says of a policy while it trains.

A few matches that are neither trained on nor part of the final evaluation are played by the policy as it
stands, and judged. The episodes are kept, so a look at them shows how the policy changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from sotopia_rl import sandbox
from sotopia_rl.dataset import PromptRow
from sotopia_rl.episode import AgentSpec, Episode, Match, Sampling
from sotopia_rl.evaluate import metrics_of
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.limits import Budget, ModelLimits
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.manifest import seated
from sotopia_rl.models import ChatModel
from sotopia_rl.simulate import Pairing, SimulateConfig, parse_action
from sotopia_rl.stages import play_and_judge
from sotopia_rl.store import EpisodeQuery, EpisodeStore, open_store

if TYPE_CHECKING:
    from sotopia_rl.train.grpo import EvalHook, Policy

CURVES = ("goal", "overall", "believability", "words_per_utterance", "secret_leaks")
"""Metrics of the final evaluation that are followed during training, where the judge gives them."""


def validation_pairings(matches: Sequence[Match], system: AgentSpec, partners: Sequence[AgentSpec]) -> list[Pairing]:
    """Each match once, the partners taking turns: a curve needs many matches more than every combination."""
    return [seated(match, system, partners[number % len(partners)]) for number, match in enumerate(matches)]


@dataclass(frozen=True)
class Monitor:
    """What the policy plays while it trains, against whom, and who judges.

    Attributes:
        simulate: The rules, and the wording of the prompts: that of the training rows.
        sampling: Of the policy.
    """

    matches: Sequence[Match]
    partners: Sequence[AgentSpec]
    judge: str
    sampling: Sampling
    simulate: SimulateConfig
    judging: JudgeConfig
    limits: ModelLimits
    budget: Budget

    def hook(self, out: Path) -> EvalHook:
        """For `train_grpo`: plays with the weights as they are, in `out/validation.db`."""
        from sotopia_rl.llm.in_process import LocalBase, LocalModel  # noqa: PLC0415 - torch

        def look(step: int, policy: Policy) -> dict[str, float]:
            base = LocalBase.around(policy.model, policy.tokenizer, out, self.limits)
            model = LocalModel(f"local/{out.resolve()}/step-{step}", base)
            return asyncio.run(self.look(model, out / "validation.db"))

        return look

    async def look(self, policy: ChatModel, episodes: Path) -> dict[str, float]:
        """Mean metrics of the policy over the matches, into the curves of a training run.

        Args:
            policy: Its name is also the tag of its episodes.
            episodes: Store that keeps them; what is there already is not played again.

        Returns:
            `score` (mean goal score in points, or the overall score where no goal is judged), the means of
            `CURVES`, and `judge_failed`, the share of matches without a score. Only that share where none has one.
        """
        with closing(open_store(episodes)) as store:
            async with ModelPool(self.limits, budget=self.budget) as pool:
                pool.add(policy)
                system = AgentSpec(model=policy.name, sampling=self.sampling)
                await play_and_judge(
                    pool,
                    store,
                    validation_pairings(self.matches, system, self.partners),
                    self.judge,
                    tag=policy.name,
                    simulate=self.simulate,
                    judging=self.judging,
                    watch=lambda _: None,
                )
            rated = store.rated(EpisodeQuery(tag=policy.name, status="completed"), judge=self.judge)
            found = [metrics_of(episode, rating, episode.match.seat) for episode, rating in rated]
        means = {name: fmean(m[name] for m in found) for name in CURVES if found and all(name in m for m in found)}
        score = {"score": means.get("goal", means["overall"])} if means else {}
        return score | means | {"judge_failed": 1 - len(found) / len(self.matches)}


def secret_leaks(stores: Sequence[EpisodeStore]) -> Callable[[PromptRow, str], bool]:
    """Whether a reply to a row gives its speaker's limit or secret away; exact in the offline world.

    Args:
        stores: Hold the episodes that the rows come from, all of the offline world: elsewhere nothing can be computed.
    """
    holder = {episode_id: store for store in stores for episode_id in store.ids()}

    @lru_cache(maxsize=256)  # a step asks about the same few rows once per completion
    def episode_of(episode_id: str) -> Episode:
        return holder[episode_id].episode(episode_id)

    def leaks(row: PromptRow, text: str) -> bool:
        try:
            action = parse_action(text)
        except ValueError:  # what nobody can read gives nothing away
            return False
        episode = episode_of(row.episode_id)
        return sandbox.gives_away(episode.match, episode.turns[: row.turn], row.seat, action)

    return leaks
