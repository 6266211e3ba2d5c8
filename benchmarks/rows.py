"""From stored episodes to training rows: time per episode, growth with their number, and memory.

    python benchmarks/rows.py                 1,000 and 10,000 episodes, about two minutes
    python benchmarks/rows.py --sizes 200 2000

Synthetic episodes of 20 turns (120 characters each, SOTOPIA's contexts) go through what `sotopia-rl reward` does:
fit the normaliser, compute the rewards, write SFT and reward-model rows, each by its own pass over the data and
without tokenising. Each size runs in a process of its own, so that its peak memory is its own. The paper's code takes
180 to 195 s for 800 to 1,000 episodes and grows with the square.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sotopia_rl.dataset import reward_rows, sft_rows, write_rows
from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS
from sotopia_rl.episode import (
    Action,
    AgentSpec,
    Attribution,
    Character,
    Episode,
    Match,
    Provenance,
    Rating,
    Sampling,
    Scenario,
    Score,
    Seat,
    Turn,
    UtteranceWeight,
    derived_ulid,
)
from sotopia_rl.reward import Credited, RewardConfig, fit_normaliser, utterance_rewards

NUM_TURNS = 20
WORDS = "The lamp is yours if I may keep the old desk, and we could share the cost of moving both of them this Sunday. "
PROVENANCE = Provenance(model="bench/judge", sampling=Sampling(), prompt_profile="default", prompt_sha256="")


def person(number: int, seat: int) -> Character:
    return Character(
        id=f"person{number % 40}-{seat}",
        first_name="Ann" if seat else "Ben",
        last_name=f"Number{number % 40}",
        age=30,
        occupation="dentist",
        gender="Woman" if seat else "Man",
        gender_pronoun="She/her" if seat else "He/him",
        public_info="Has two cats and a piano. " * 4,
        personality_and_values="Open, careful, values fairness. " * 6,
        secret="Has a debt that nobody knows of.",  # noqa: S106  a secret of the story
    )


def episode(number: int) -> Episode:
    scenario = Scenario(
        id=f"scenario{number % 90}",
        description="Two neighbours share what an uncle left them. " * 3,
        goals=("Get the lamp. " * 5, "Get the desk. " * 5),
        relationship=number % 4,
    )
    match = Match.of(scenario, (person(number, 0), person(number, 1)), seed=number)
    turns = tuple(
        Turn(index=i, seat=0 if i % 2 == 0 else 1, action=Action(action_type="speak", argument=f"{i}: {WORDS}"))
        for i in range(NUM_TURNS)
    )
    return Episode(
        id=derived_ulid("rows", number),
        tag="bench",
        match=match,
        agents=(AgentSpec(model="bench/a"), AgentSpec(model="bench/b")),
        prompt_profile="default",
        status="completed",
        end_reason="turn_limit",
        turns=turns,
    )


def credited(number: int) -> Credited:
    played = episode(number)
    points = {
        d.name: Score(score=(number * 7 + i) % (d.high - d.low + 1) + d.low) for i, d in enumerate(SOTOPIA_DIMENSIONS)
    }
    rating = Rating(episode_id=played.id, judge="bench/judge", scores=(points, points), provenance=PROVENANCE)
    seats: tuple[Seat, Seat] = (0, 1)
    attributions = tuple(
        Attribution(
            episode_id=played.id,
            seat=seat,
            dimension=name,
            method="direct",
            annotator="bench/annotator",
            weights=tuple(
                UtteranceWeight(turn=t.index, weight=(t.index + number) % 4) for t in played.utterances(seat)
            ),
            provenance=PROVENANCE,
        )
        for seat in seats
        for name in ("goal", "relationship", "knowledge")
    )
    return Credited(played, rating, attributions)


def run(size: int, folder: Path) -> None:
    """One size: prints seconds of making the episodes, of each pass, the rows, and the peak memory."""
    config = RewardConfig()

    def data() -> Iterator[Credited]:
        return (credited(number) for number in range(size))

    start = time.process_time()
    for _ in data():
        pass
    making = time.process_time() - start

    start = time.process_time()
    normaliser = fit_normaliser(data(), config)
    count = write_rows((row for c in data() for row in sft_rows(c.episode)), folder / "sft.jsonl")
    count += write_rows(
        (row for c in data() for row in reward_rows(c.episode, utterance_rewards(c, config, normaliser))),
        folder / "reward.jsonl",
    )
    # Three passes made the episodes three times; that is not what is measured.
    seconds = time.process_time() - start - 3 * making
    size_mb = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{seconds:.3f} {count} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} {size_mb:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            run(args.one, Path(folder))
        return
    print("| episodes | CPU seconds | per 1,000 | rows | MB written | peak memory |")
    print("|---|---|---|---|---|---|")
    seconds = {}
    for size in args.sizes:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(size)], capture_output=True, text=True, check=True
        )
        taken, rows, memory, written = done.stdout.split()
        seconds[size] = float(taken)
        print(f"| {size:,} | {taken} | {float(taken) / size * 1000:.2f} | {rows} | {written} | {memory} MB |")
    first, last = args.sizes[0], args.sizes[-1]
    print(f"\n{last / first:g} times the episodes took {seconds[last] / seconds[first]:.1f} times the time")


if __name__ == "__main__":
    main()
