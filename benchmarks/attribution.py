"""Every attribution method against the exact credit of the offline world: fidelity, calls and tokens per episode.

    python benchmarks/attribution.py                  about two minutes
    python benchmarks/attribution.py --episodes 40    a quick look
    python benchmarks/attribution.py --json table.json

Scripted speakers play sandbox matches, the verifiable judge scores them, the scripted annotator answers each
method's questions as a perfect reader would, and noisy ones answer a share of them at random. So what separates
the methods is what they ask, and what separates the annotators is what they know. Tokens are words of the scripted
models; compare them with one another only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sotopia_rl import sandbox
from sotopia_rl.attribute import AttributionConfig, attribute_all
from sotopia_rl.attribute.fidelity import Case, Fidelity, fidelity
from sotopia_rl.episode import AgentSpec, Attribution, Episode, Failure, Rating, Usage
from sotopia_rl.judge import JudgeConfig, judge_all
from sotopia_rl.models import ChatModel
from sotopia_rl.simulate import Pairing, SimulateConfig, simulate

DIMENSIONS = ("goal", "relationship", "knowledge")
METHODS: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("exact", "annotator", {"method": "exact"}),
    ("direct, scale 3", "annotator", {"method": "direct"}),
    ("direct, scale 5", "annotator", {"method": "direct", "scale": 5}),
    ("direct, scale 10", "annotator", {"method": "direct", "scale": 10}),
    ("direct, one call per dimension", "annotator", {"method": "direct", "together": False}),
    ("direct, online", "annotator", {"method": "direct", "view": "online"}),
    ("direct normalised", "annotator", {"method": "direct_normalised"}),
    ("counterfactual", "annotator", {"method": "counterfactual"}),
    ("goal progress", "annotator", {"method": "goal_progress"}),
    ("goal progress, online", "annotator", {"method": "goal_progress", "view": "online"}),
    ("singular", "annotator", {"method": "singular"}),
    ("utterance quality", "annotator", {"method": "utterance_quality"}),
    ("response only", "annotator", {"method": "response_only"}),
    ("scaled (0.9)", "annotator", {"method": "scaled"}),
    ("uniform", "annotator", {"method": "uniform"}),
    ("uniform, split", "annotator", {"method": "uniform_split"}),
    ("direct, noise 25%", "annotator-noise-25", {"method": "direct"}),
    ("direct, noise 50%", "annotator-noise-50", {"method": "direct"}),
    ("direct, noise 50%, mean of 5", "annotator-noise-50", {"method": "direct", "samples": 5, "temperature": 1.0}),
    ("direct, noise 75%", "annotator-noise-75", {"method": "direct"}),
    ("direct, noise 100%", "annotator-noise-100", {"method": "direct"}),
)
"""Name, annotator, settings."""


async def rated_episodes(count: int, seed: int) -> list[tuple[Episode, Rating]]:
    """Sandbox episodes between all pairs of temperaments in turn, with their ratings."""
    speakers = [f"scripted/{name}" for name in sandbox.TEMPERAMENTS]
    matches = sandbox.matches("train", count, seed=seed)
    pairings = []
    for number, match in enumerate(matches):
        first, second = speakers[number % len(speakers)], speakers[number // len(speakers) % len(speakers)]
        pairings.append(Pairing(match=match, agents=(AgentSpec(model=first), AgentSpec(model=second))))
    models = {name: sandbox.SCRIPTED[name.removeprefix("scripted/")]() for name in speakers}
    config = SimulateConfig()
    episodes = [e async for e in simulate(pairings, models.__getitem__, tag="bench", config=config)]
    judge = sandbox.SCRIPTED["judge"]()
    whole = [e for e in episodes if e.status == "completed"]
    rated = [(e, r) async for e, r in judge_all(whole, judge, JudgeConfig(), limit=16) if isinstance(r, Rating)]
    return sorted(rated, key=lambda pair: pair[0].id)


async def attributions_of(
    rated: Sequence[tuple[Episode, Rating]], model: ChatModel, config: AttributionConfig
) -> tuple[list[Attribution], int]:
    """All attributions, and how many items failed."""
    found: list[Attribution] = []
    failed = 0
    async for _, outcome in attribute_all(rated, model, config, limit=16):
        if isinstance(outcome, Failure):
            failed += 1
        else:
            found += outcome
    return found, failed


def cases(
    rated: Sequence[tuple[Episode, Rating]], found: Sequence[Attribution], dimensions: Sequence[str]
) -> Iterator[Case]:
    by_id = {episode.id: (episode, rating) for episode, rating in rated}
    for a in found:
        if a.dimension in dimensions:
            episode, rating = by_id[a.episode_id]
            yield Case(
                cluster=episode.match.scenario.id,
                given={turn: weight / a.top_weight for turn, weight in a.by_turn().items()},
                exact=sandbox.exact_credit(episode.match, episode.turns, a.seat, a.dimension),
                score=rating.points(a.seat)[a.dimension],
            )


def measure(name: str, annotator: str, settings: dict[str, object], rated: Sequence[tuple[Episode, Rating]]) -> dict:
    """One row of the table."""
    config = AttributionConfig.model_validate({"dimensions": DIMENSIONS, **settings})
    found, failed = asyncio.run(attributions_of(rated, sandbox.SCRIPTED[annotator](), config))
    usage = sum((a.provenance.usage for a in found), Usage())
    goal: Fidelity = fidelity(cases(rated, found, ["goal"]))
    every: Fidelity = fidelity(cases(rated, found, DIMENSIONS))
    return {
        "method": name,
        "goal_spearman": str(goal.spearman),
        "goal_top1": str(goal.top1),
        "goal_reward_pearson": str(goal.reward_pearson),
        "all_spearman": str(every.spearman),
        "calls": usage.calls / len(rated),
        "tokens": (usage.prompt_tokens + usage.completion_tokens) / len(rated),
        "failed": failed,
        "cases": goal.num_cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args()
    rated = asyncio.run(rated_episodes(args.episodes, args.seed))
    print(f"{len(rated)} episodes, seed {args.seed}; 95% intervals by bootstrap over scenarios\n")
    print("| method | goal: Spearman | goal: top-1 | goal: reward r | three: Spearman | calls | tokens | failed |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name, annotator, settings in METHODS:
        row = measure(name, annotator, settings, rated)
        rows.append(row)
        print(
            f"| {name} | {row['goal_spearman']} | {row['goal_top1']} | {row['goal_reward_pearson']} "
            f"| {row['all_spearman']} | {row['calls']:.1f} | {row['tokens']:.0f} | {row['failed']} |"
        )
        sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
