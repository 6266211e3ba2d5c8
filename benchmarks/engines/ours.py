"""Our engine on a local model server: plays and judges episodes into SQLite, prints what it took as JSON.

    python ours.py JOB     JOB is a JSON object: url, at_once, episodes, match

The path is that of `sotopia-rl simulate --judge`: prompts, HTTP client, strict reading, records, store.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import sotopia_rl.llm.client  # noqa: F401  comes in with the first model otherwise, when time is taken
from sotopia_rl import stages
from sotopia_rl.episode import AgentSpec, Character, Match, Scenario
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import with_models
from sotopia_rl.simulate import Pairing, SimulateConfig
from sotopia_rl.store import EpisodeQuery, open_store


def play(job: dict, store_path: Path) -> dict[str, float]:
    first, second = (Character(id=str(i), **fields) for i, fields in enumerate(job["match"]["characters"]))
    scenario = Scenario(id="bench", **job["match"]["scenario"])
    matches = [Match.of(scenario, (first, second), seed=seed) for seed in range(job["episodes"])]
    agent = AgentSpec(model=f"custom/agent@{job['url']}")
    judge = f"custom/judge@{job['url']}"
    pairings = [Pairing(match, (agent, agent)) for match in matches]
    config = SimulateConfig(concurrency=job["at_once"])
    limits = ModelLimits(max_in_flight=job["at_once"], max_retries=0)
    store = open_store(store_path)
    start_cpu, start = time.process_time(), time.perf_counter()
    with_models(
        limits,
        lambda pool: stages.play_and_judge(
            pool, store, pairings, judge, tag="bench", simulate=config, judging=JudgeConfig(), watch=lambda _: None
        ),
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    completed = store.count(EpisodeQuery(tag="bench", status="completed"))
    rated = len(store.rated_ids(judge))
    if completed != job["episodes"] or rated != job["episodes"]:
        sys.exit(f"{completed} episodes completed and {rated} judged of {job['episodes']}: the figures would be wrong")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def main() -> None:
    job = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        figures = play(job, Path(folder) / "bench.db")
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
