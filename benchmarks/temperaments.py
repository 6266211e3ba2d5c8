"""How the scripted temperaments fare against each other in the offline world; prints the tables of docs/sandbox.md.

python benchmarks/temperaments.py --count 64
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence

from sotopia_rl import sandbox
from sotopia_rl.episode import AgentSpec, Episode, Match
from sotopia_rl.models import ChatModel
from sotopia_rl.simulate import Pairing, SimulateConfig, simulate

SHOWN = ("goal", "relationship", "knowledge", "secret", "social_rules", "believability")
Key = tuple[str, ...]
Table = dict[Key, list[float]]


def pairings(matches: Sequence[Match]) -> Iterable[Pairing]:
    """Every temperament in the first seat against every one in the second, on every match."""
    for first in sandbox.TEMPERAMENTS:
        for second in sandbox.TEMPERAMENTS:
            specs = (AgentSpec(model=f"scripted/{first}"), AgentSpec(model=f"scripted/{second}"))
            for match in matches:
                yield Pairing(match, specs)


def played(matches: Sequence[Match]) -> AsyncIterator[Episode]:
    models: dict[str, ChatModel] = {f"scripted/{name}": make() for name, make in sandbox.SCRIPTED.items()}
    config = SimulateConfig(prompt_profile="compact", max_turns=12)
    return simulate(pairings(matches), models.__getitem__, tag="temperaments", config=config)


async def measure(matches: Sequence[Match]) -> tuple[Table, list[int]]:
    """Points by (what, who) and lengths in turns."""
    table: Table = defaultdict(list)
    lengths: list[int] = []
    async for episode in played(matches):
        names = [agent.model.partition("/")[2] for agent in episode.agents]
        both = sandbox.sides(episode.match)
        lengths.append(len(episode.turns))
        for seat, scores in enumerate(sandbox.verdict(episode.match, episode.turns)):
            points = {name: score.score for name, score in scores.items()}
            name = names[seat]
            table["against", name, names[1 - seat]].append(points["goal"])
            table["overall", name].append(statistics.mean(points.values()))
            table["role", name, both[seat].role].append(points["goal"])
            for dimension in SHOWN:
                table[dimension, name].append(points[dimension])
    return table, lengths


def print_rows(title: str, heads: Sequence[str], keys: Sequence[Sequence[Key]], table: Table) -> None:
    print(f"\n| {title} | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, row in zip(sandbox.TEMPERAMENTS, keys, strict=True):
        print(f"| {name} | {' | '.join(f'{statistics.mean(table[key]):.2f}' for key in row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="matches per ordered pair")
    count = parser.parse_args().count
    table, lengths = asyncio.run(measure(sandbox.matches("train", count)))
    names = list(sandbox.TEMPERAMENTS)
    roles = ("seller", "buyer", "sharer", "planner", "keeper", "asker")
    print(f"{len(lengths)} episodes, {statistics.mean(lengths):.1f} turns on average, {max(lengths)} at most")
    print_rows("mean points", ["overall", *SHOWN], [[(d, n) for d in ("overall", *SHOWN)] for n in names], table)
    print_rows("goal against", names, [[("against", n, m) for m in names] for n in names], table)
    print_rows("goal as", roles, [[("role", n, r) for r in roles] for n in names], table)


if __name__ == "__main__":
    main()
