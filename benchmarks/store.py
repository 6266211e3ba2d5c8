"""100,000 episodes in SQLite: how fast they are written, listed and exported, and in how much memory.

    python benchmarks/store.py                   some minutes, and about 3 GB under --folder, removed afterwards
    python benchmarks/store.py --episodes 5000   a quick look

The episodes are synthetic: 20 turns of 120 characters each, with a rating by one judge with seven reasons a seat.
Exports run in processes of their own, so that their peak memory is theirs alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS
from sotopia_rl.episode import (
    Action,
    AgentSpec,
    Character,
    Episode,
    Match,
    Provenance,
    Rating,
    Sampling,
    Scenario,
    Score,
    Turn,
    derived_ulid,
)
from sotopia_rl.store import EpisodeQuery, SQLiteStore

T = TypeVar("T")

NUM_TURNS = 20
NUM_TAGS = 10
WORDS = "The lamp is yours if I may keep the old desk, and we could share the cost of moving both of them this Sunday. "

# Peak memory from /proc where there is one: what getrusage says includes the process that was forked.
EXPORT = """
import re, resource, sys, time
from pathlib import Path
from sotopia_rl.store import export_file, open_store
start, cpu = time.perf_counter(), time.process_time()
report = export_file(open_store(sys.argv[1]), Path(sys.argv[2]), layout=sys.argv[3])
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
status = Path("/proc/self/status")
peak = re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1] if status.exists() else 0
peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(report.episodes, seconds, cpu, peak)
"""


def person(seat: int) -> Character:
    return Character(
        id=f"person{seat}",
        first_name="Ann" if seat else "Ben",
        last_name="Lee",
        age=30 + seat,
        occupation="gardener",
        gender="Woman" if seat else "Man",
        gender_pronoun="She/her" if seat else "He/him",
        public_info=WORDS,
        personality_and_values=WORDS,
        secret=WORDS,
    )


def synthetic(count: int) -> Iterator[Episode]:
    """Episodes that differ in id, tag, scenario and in one turn each."""
    spec = AgentSpec(model="custom/a@http://localhost:8000/v1")
    argument = WORDS[:120]
    turns = tuple(
        Turn(
            index=index,
            seat=1 if index % 2 else 0,
            action=Action(action_type="speak", argument=argument),
            reply=Action(action_type="speak", argument=argument).to_json(),
            prompt_sha256="0" * 64,
        )
        for index in range(NUM_TURNS)
    )
    matches = [
        Match.of(
            Scenario(id=f"scenario{n}", codename=f"code{n}", description=WORDS, goals=(WORDS, WORDS)),
            (person(0), person(1)),
        )
        for n in range(90)
    ]
    for number in range(count):
        action = Action(action_type="speak", argument=f"{number} {argument}")
        yield Episode(
            id=derived_ulid("benchmark", number),
            tag=f"tag{number % NUM_TAGS}",
            match=matches[number % len(matches)],
            agents=(spec, spec),
            prompt_profile="sotopia-0.1.4",
            status="completed",
            end_reason="turn_limit",
            turns=(turns[0].model_copy(update={"action": action}), *turns[1:]),
        )


def rating(episode_id: str) -> Rating:
    seat = {dimension.name: Score(score=dimension.high, reason=WORDS) for dimension in SOTOPIA_DIMENSIONS}
    made_by = Provenance(
        model="openai/gpt-4o", sampling=Sampling(temperature=0), prompt_profile="default", prompt_sha256="0" * 64
    )
    return Rating(episode_id=episode_id, judge="openai/gpt-4o", scores=(seat, seat), provenance=made_by)


@dataclass(frozen=True)
class Took:
    """Wall-clock and CPU seconds of some work. On a busy machine only the second says much."""

    wall: float
    cpu: float

    def seconds(self) -> str:
        return f"{self.wall:.3f} s ({self.cpu:.3f} CPU)"

    def rate(self, count: int) -> str:
        return f"{count / self.wall:,.0f}/s ({1000 * self.cpu / count:.2f} ms CPU each)"


def timed(work: Callable[[], T]) -> tuple[Took, T]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Took(time.perf_counter() - wall, time.process_time() - cpu), result


def best(work: Callable[[], object], *, repeats: int = 7) -> str:
    return min((timed(work)[0] for _ in range(repeats)), key=lambda took: took.wall).seconds()


def measure(path: Path, count: int) -> Iterator[tuple[str, str]]:
    """(what, figure) of each step."""
    with SQLiteStore(path) as store:
        took, _ = timed(lambda: store.add_episodes(synthetic(count)))
        yield "write episodes, 200 a transaction", took.rate(count)
        took, _ = timed(lambda: store.add_ratings(rating(episode_id) for episode_id in store.ids()))
        yield "write ratings, 200 a transaction", took.rate(count)
        again = list(synthetic(min(count, 500)))
        took, _ = timed(lambda: [store.add_episode(episode) for episode in again])
        yield "write episodes, one a transaction", took.rate(len(again))
    with SQLiteStore(path) as store:
        one_tag = EpisodeQuery(tag="tag3")
        took, first = timed(lambda: list(store.summaries(one_tag)))
        yield f"list one tag ({len(first):,}), just opened", took.seconds()
        yield f"list one tag ({len(first):,})", best(lambda: list(store.summaries(one_tag)))
        yield f"list all ({count:,})", best(lambda: list(store.summaries()))
        yield "count one tag", best(lambda: store.count(one_tag))
        yield "all tags with their counts", best(store.tags)
        yield "search a model that never played", best(lambda: store.count(EpisodeQuery(model="nobody")))
        some = store.ids()[:: max(1, count // 500)]
        took, _ = timed(lambda: [store.episode(episode_id) for episode_id in some])
        yield "read one episode", took.rate(len(some))
    yield "database", f"{path.stat().st_size / 1e6:,.0f} MB"
    for layout in ("sotopia-rl", "sotopia"):
        yield f"export to {layout} JSONL", export_in_a_process(path, layout)


def export_in_a_process(path: Path, layout: str) -> str:
    target = path.with_suffix(".export")
    command = [sys.executable, "-c", EXPORT, str(path), str(target), layout]
    exported, wall, cpu, peak_kb = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    size = target.stat().st_size / 1e6
    target.unlink()
    rate = Took(float(wall), float(cpu)).rate(int(exported))
    return f"{rate}, {size:,.0f} MB, peak memory {int(peak_kb) / 1024:.0f} MB"


def small_export(folder: Path) -> str:
    """The same for 1,000 episodes: what streaming is compared with."""
    path = folder / "small.db"
    with SQLiteStore(path) as store:
        store.add_episodes(synthetic(1000))
        store.add_ratings(rating(episode_id) for episode_id in store.ids())
    return export_in_a_process(path, "sotopia-rl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where there is room; a temporary folder by default")
    arguments = parser.parse_args()
    table = Table("step", "figure", title=f"{arguments.episodes:,} episodes of {NUM_TURNS} turns, SQLite")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for what, figure in measure(Path(name) / "episodes.db", arguments.episodes):
            table.add_row(what, figure)
        table.add_row("export of 1,000 to sotopia-rl JSONL", small_export(Path(name)))
    Console().print(table)


if __name__ == "__main__":
    main()
