"""How long results and report of stored episodes take: two systems, a panel of two judges, two partners.

    python benchmarks/evaluation.py [--episodes 1000] [--markdown]

The episodes are drawn, not played (20 turns of 20 words). Timed is everything that `sotopia-rl evaluate compare` does:
reading the stores, every comparison with its intervals, judges and partners, the page. Target: 20 s.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from played_systems import conversation, judged_by, manifest, played
from sotopia_rl.commands.evaluation import publish
from sotopia_rl.episode import Action, Episode
from sotopia_rl.evaluate.folder import Plan, save_plan, store_path
from sotopia_rl.store import open_store

JUDGES = ("scripted/judge", "scripted/annotator")
SKILL = {"sft": 4.0, "grpo": 5.0}


def long(episode: Episode) -> Episode:
    """The same episode with 20 turns of about 20 words."""
    turns = conversation(random.Random(episode.id), 20)
    said = [
        turn.model_copy(
            update={"action": Action(action_type="speak", argument=f"{turn.action.argument} " + "word " * 17)}
        )
        if turn.action.action_type == "speak"
        else turn
        for turn in turns
    ]
    return episode.model_copy(update={"turns": tuple(said)})


def fill(folder: Path, num_episodes: int) -> int:
    """Make a run folder; how many episodes it holds."""
    over = manifest(-(-num_episodes // 16))  # two seats, two partners, two settings, two systems
    plan = Plan(
        systems={name: f"local/runs/{name}" for name in SKILL},
        partners=("scripted/fair", "scripted/tough"),
        judges=JUDGES,
        greedy=True,
    )
    save_plan(plan, over, folder)
    count = 0
    for name, skill in SKILL.items():
        p = played(name, skill, over)
        with closing(open_store(store_path(folder, name))) as store:
            count += store.add_episodes(long(e) for e in p.episodes)
            for shift, judge in enumerate(JUDGES):
                store.add_ratings(judged_by(p, judge, skill=skill + shift, noise=1.5).ratings.values())
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, nargs="*", default=[1000])
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    lines = ["| episodes | CPU s | wall s | peak MB | page MB |", "|---|---|---|---|---|"]
    for wanted in options.episodes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            count = fill(folder, wanted)
            cpu, wall = time.process_time(), time.perf_counter()
            publish([folder], folder)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            page = (folder / "report.html").stat().st_size / 2**20
            lines.append(f"| {count} | {cpu:.1f} | {wall:.1f} | {peak:.0f} | {page:.1f} |")
    print("\n".join(lines) if options.markdown else lines[-1])


if __name__ == "__main__":
    main()
