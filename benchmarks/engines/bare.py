"""aiohttp alone: the same number of calls with bodies of the same size, and nothing of an engine. The floor.

python bare.py JOB     JOB as for ours.py
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from typing import Any

import aiohttp

CALLS_PER_EPISODE = 21
PROMPT = "You are at Turn #0. " + "What was said before, in so many words. " * 130


async def play(job: dict[str, Any]) -> dict[str, float]:
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": PROMPT}]}).encode()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers={"Content-Type": "application/json"}) as session:

        async def one(episodes: int) -> None:
            for _ in range(CALLS_PER_EPISODE * episodes):
                async with session.post(f"{job['url']}/chat/completions", data=body) as response:
                    json.loads(await response.read())

        start_cpu, start = time.process_time(), time.perf_counter()
        await asyncio.gather(*(one(job["episodes"] // job["at_once"]) for _ in range(job["at_once"])))
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}


def main() -> None:
    figures = asyncio.run(play(json.loads(sys.argv[1])))
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
