"""The published sotopia on a local model server; runs in that package's own environment (0.1.4 or 0.1.5).

    REDIS_OM_URL=redis://... python published.py JOB RESULT     JOB as for ours.py; RESULT is a file for the figures

Nothing of it is changed but one thing: 0.1.5 makes its EpisodeLog without a `pk` and so crashes at the end of every
episode; it is given an empty one.
"""

import asyncio
import functools
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import sotopia.server
from sotopia.agents import LLMAgent
from sotopia.database import AgentProfile, EnvironmentProfile
from sotopia.envs import evaluators
from sotopia.envs.parallel import ParallelSotopiaEnv

if hasattr(evaluators, "EvaluationForAgents"):  # 0.1.5
    from sotopia.database import SotopiaDimensions

    FORM = evaluators.EvaluationForAgents[SotopiaDimensions]
else:
    FORM = evaluators.EvaluationForTwoAgents[evaluators.SotopiaDimensions]

sotopia.server.EpisodeLog = functools.partial(sotopia.server.EpisodeLog, pk="")


def environment(profile: EnvironmentProfile, judge: str) -> ParallelSotopiaEnv:
    return ParallelSotopiaEnv(
        env_profile=profile,
        model_name=judge,
        action_order="round-robin",
        evaluators=[evaluators.RuleBasedTerminatedEvaluator(max_turn_number=20, max_stale_turn=2)],
        terminal_evaluators=[evaluators.EpisodeLLMEvaluator(judge, FORM)],
    )


async def play(job: dict[str, Any]) -> dict[str, float]:
    agent, judge = f"custom/agent@{job['url']}", f"custom/judge@{job['url']}"
    people = [AgentProfile(pk=f"bench{i}", **fields) for i, fields in enumerate(job["match"]["characters"])]
    scene = job["match"]["scenario"]
    place = EnvironmentProfile(
        pk="bench",
        codename="bench",
        source="bench",
        scenario=scene["description"],
        agent_goals=list(scene["goals"]),
        relationship=scene["relationship"],
    )
    for profile in (*people, place):
        profile.save()
    start_cpu, start = time.process_time(), time.perf_counter()
    room = asyncio.Semaphore(job["at_once"])

    async def one() -> None:
        async with room:
            seats = [LLMAgent(agent_profile=profile, model_name=agent) for profile in people]
            await sotopia.server.arun_one_episode(env=environment(place, judge), agent_list=seats, tag="bench")

    await asyncio.gather(*(one() for _ in range(job["episodes"])))
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


async def main() -> None:
    figures = await play(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(figures))
    os._exit(0)  # litellm can keep asyncio.run from ending on Python 3.11


if __name__ == "__main__":
    asyncio.run(main())
