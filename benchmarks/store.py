"""100,000 episodes in SQLite: how fast they are written, listed and exported, and in how much memory.

    python benchmarks/store.py                   some minutes, and about 3 GB under --folder, removed afterwards
    python benchmarks/store.py --episodes 5000   a quick look

The episodes are synthetic: 20 turns of 120 characters each, with a rating by one judge with seven reasons a seat.
Exports run in processes of their own, so that their peak memory is theirs alone.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from sotopia_rl.store import EpisodeQuery, SQLiteStore, export_file

T = TypeVar("T")

NUM_TURNS = 20
NUM_TAGS = 10
WORDS = "The lamp is yours if I may keep the old desk, and we could share the cost of moving both of them this Sunday. "

EXPORT = """
import resource, sys
from pathlib import Path
from sotopia_rl.store import export_file, open_store
report = export_file(open_store(sys.argv[1]), Path(sys.argv[2]), layout=sys.argv[3])
print(report.episodes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
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


def timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def best(work: Callable[[], T], *, repeats: int = 5) -> tuple[float, T]:
    return min((timed(work) for _ in range(repeats)), key=lambda pair: pair[0])


def measure(path: Path, count: int) -> Iterator[tuple[str, str]]:
    """(what, figure) of each step."""
    with SQLiteStore(path) as store:
        seconds, _ = timed(lambda: store.add_episodes(synthetic(count)))
        yield "write episodes, 200 a transaction", f"{count / seconds:,.0f}/s"
        seconds, _ = timed(lambda: store.add_ratings(rating(episode_id) for episode_id in store.ids()))
        yield "write ratings, 200 a transaction", f"{count / seconds:,.0f}/s"
        again = list(synthetic(min(count, 500)))
        seconds, _ = timed(lambda: [store.add_episode(episode) for episode in again])
        yield "write episodes, one a transaction (replacing)", f"{len(again) / seconds:,.0f}/s"
    with SQLiteStore(path) as store:
        one_tag = EpisodeQuery(tag="tag3")
        seconds, first = timed(lambda: list(store.summaries(one_tag)))
        yield f"list one tag ({len(first):,} episodes), store just opened", f"{seconds:.3f} s"
        yield f"list one tag ({len(first):,} episodes)", f"{best(lambda: list(store.summaries(one_tag)))[0]:.3f} s"
        yield f"list all ({count:,} episodes)", f"{best(lambda: list(store.summaries()))[0]:.3f} s"
        yield "count one tag", f"{best(lambda: store.count(one_tag))[0]:.4f} s"
        yield "all tags with their counts", f"{best(store.tags)[0]:.3f} s"
        one_model = EpisodeQuery(model="nobody")
        yield "search a model that never played", f"{best(lambda: store.count(one_model))[0]:.3f} s"
        some = store.ids()[:: max(1, count // 500)]
        seconds, _ = timed(lambda: [store.episode(episode_id) for episode_id in some])
        yield "read one episode", f"{1000 * seconds / len(some):.2f} ms"
    yield "database", f"{path.stat().st_size / 1e6:,.0f} MB"
    for layout in ("sotopia-rl", "sotopia"):
        target = path.with_name("export.jsonl")
        command = [sys.executable, "-c", EXPORT, str(path), str(target), layout]
        seconds, done = timed(lambda: subprocess.run(command, check=True, capture_output=True, text=True))  # noqa: B023
        exported, peak_kb = (int(part) for part in done.stdout.split())
        size = target.stat().st_size / 1e6
        target.unlink()
        yield f"export to {layout} JSONL", f"{exported / seconds:,.0f}/s, {size:,.0f} MB, peak {peak_kb / 1024:.0f} MB"


def small_export_peak(folder: Path) -> str:
    """Peak memory of exporting 200 episodes: what streaming is compared with."""
    path = folder / "small.db"
    with SQLiteStore(path) as store:
        store.add_episodes(synthetic(200))
        export_file(store, folder / "small.jsonl")
    command = [sys.executable, "-c", EXPORT, str(path), str(folder / "small.jsonl"), "sotopia-rl"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return f"peak {int(done.stdout.split()[1]) / 1024:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where there is room; a temporary folder by default")
    arguments = parser.parse_args()
    table = Table("step", "figure", title=f"{arguments.episodes:,} episodes of {NUM_TURNS} turns, SQLite")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for what, figure in measure(Path(name) / "episodes.db", arguments.episodes):
            table.add_row(what, figure)
        table.add_row("export of 200 episodes, to compare", small_export_peak(Path(name)))
    table.add_row("this process", f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    main()
