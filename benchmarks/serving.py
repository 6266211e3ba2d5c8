"""The best-of-N server under load: batching, overload, and a policy that dies and comes back.

    python benchmarks/serving.py               two or three minutes
    python benchmarks/serving.py --seconds 2   shorter
    python benchmarks/serving.py --markdown    the tables as Markdown, for docs/benchmarks.md

The server is the real command in a process of its own, the policy a local server whose replies cost next to nothing
(engines/model_server.py, 500 different utterances), the reward model a random one of two narrow layers: what is
measured is the server. Requests: a chat, of which ten candidates are scored; `/v1/score` with one utterance, and with
ten of one prompt. Three ways of scoring, the same otherwise: in shared batches (the default); one request to the
reward model at a time (`--max-batch 1`), which is the candidates of one chat, or one utterance of `/v1/score`; and one
reply at a time (with `--max-batch-tokens 1`), which is what the published reward model server does. Every reply that
comes back is checked to be one that the policy gave.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from sotopia_rl import sandbox
from sotopia_rl.observe import agent_prompt
from sotopia_rl.serve.vllm import free_port

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent / "engines")]

CANDIDATES = 10


@dataclass(frozen=True)
class Kind:
    """What clients ask for."""

    name: str
    path: str
    items: int = 0
    """Utterances to score, of one prompt."""


CHAT = Kind(f"chat, {CANDIDATES} candidates", "/v1/chat/completions")
SCORE = Kind("score, 1 utterance", "/v1/score", 1)
SCORE_MANY = Kind(f"score, {CANDIDATES} utterances", "/v1/score", CANDIDATES)
KINDS = (CHAT, SCORE, SCORE_MANY)
REPLIES = 500
WAYS = {
    "shared batches": [],
    "one request at a time": ["--max-batch", "1"],
    "one reply at a time": ["--max-batch", "1", "--max-batch-tokens", "1"],
}


@dataclass
class Load:
    """What clients saw in one run."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    timeline: list[tuple[float, str]] = field(default_factory=list)
    """Seconds since the start and the outcome of every request."""

    @property
    def per_second(self) -> float:
        return self.statuses["200"] / self.seconds

    def percentile_ms(self, share: float) -> float:
        return 1000 * statistics.quantiles(self.latencies, n=100)[round(100 * share) - 1] if self.latencies else 0.0


def small_reward_model(folder: Path) -> Path:
    """A random reward adapter on a random base of two narrow layers, with a tokenizer of these texts."""
    from sotopia_rl.train.config import TinyModelSettings
    from sotopia_rl.train.tiny import tiny_model, tiny_tokenizer
    from tiny_llm import save_reward_adapter

    tokenizer = tiny_tokenizer([*prompts(), *utterances()], 2000)
    shape = TinyModelSettings(hidden_size=32, mlp_size=64, layers=2, heads=2, key_value_heads=2)
    tiny_model(tokenizer, shape).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return save_reward_adapter(folder / "base", folder / "rm", seed=1)


def prompts() -> list[str]:
    return [agent_prompt(match, [], 0, profile="default") for match in sandbox.matches("train", 200)]


def utterances() -> set[str]:
    """All that the policy ever says."""
    from model_server import UTTERANCE

    texts = [UTTERANCE, *(f"{UTTERANCE} Say {number}?" for number in range(1, REPLIES))]
    return {json.dumps({"action_type": "speak", "argument": text}) for text in texts}


def start_policy(port: int) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "port"
        script = Path(__file__).parent / "engines" / "model_server.py"
        command = [sys.executable, str(script), str(ready), "--port", str(port), "--replies", str(REPLIES)]
        process = subprocess.Popen(command)
        wait_for(ready.exists)
    return process


@contextmanager
def policy() -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """Its model string, and what kills it and starts it again at the same address."""
    port = free_port("127.0.0.1", 0)
    running = [start_policy(port)]

    def kill() -> None:
        running[0].kill()
        running[0].wait()

    def restart() -> None:
        running[0] = start_policy(port)

    try:
        yield f"custom/policy@http://127.0.0.1:{port}/v1", kill, restart
    finally:
        kill()


@contextmanager
def best_of_n(policy_name: str, reward_model: Path, *options: str) -> Iterator[str]:
    """The address of a server while it runs."""
    port = free_port("127.0.0.1", 0)
    command = [sys.executable, "-m", "sotopia_rl.cli", "serve", "best-of-n", "--policy", policy_name]
    command += ["--reward-model", str(reward_model), "-n", str(CANDIDATES), "--port", str(port), *options]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=quiet)
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit("waited for a minute in vain")
        time.sleep(0.02)


async def load(address: str, kind: Kind, *, clients: int, seconds: float, during: Any = None) -> Load:
    """Clients that ask again as soon as they have an answer, and after the time that a 429 or 503 names."""
    bodies, known = itertools.cycle(request_bodies(kind)), utterances()
    start = time.monotonic()
    seen = Load(seconds)

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < start + seconds:
            began = time.monotonic()
            pause = await one(session, next(bodies), began)
            await asyncio.sleep(pause)

    async def one(session: aiohttp.ClientSession, body: bytes, began: float) -> float:
        try:
            async with session.post(address + kind.path, data=body) as response:
                outcome = judged(kind, response.status, await response.read(), response.headers, known)
        except (aiohttp.ClientError, OSError) as error:
            outcome = type(error).__name__
        now = time.monotonic()
        seen.statuses[outcome] += 1
        seen.timeline.append((now - start, outcome))
        if outcome == "200":
            seen.latencies.append(now - began)
        return 0.0 if outcome == "200" else 1.0

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)), *([during()] if during else []))
    seen.seconds = time.monotonic() - start
    return seen


def request_bodies(kind: Kind) -> list[bytes]:
    """One per prompt."""
    said = itertools.cycle(sorted(utterances()))
    bodies: list[dict[str, Any]] = []
    for prompt in prompts():
        chat = [{"role": "user", "content": prompt}]
        items = [{"messages": chat, "completion": next(said)} for _ in range(kind.items)]
        bodies.append({"items": items} if items else {"model": "best-of-n", "messages": chat, "max_tokens": 64})
    return [json.dumps(body).encode() for body in bodies]


def judged(kind: Kind, status: int, raw: bytes, headers: Any, known: set[str]) -> str:
    """The status, or what is wrong with the answer."""
    body = json.loads(raw)
    if status == 200 and kind is CHAT:
        return "200" if body["choices"][0]["message"]["content"] in known else "WRONG UTTERANCE"
    if status == 200:
        scores = [score["score"] for score in body["data"]]
        return "200" if len(scores) == kind.items and all(isinstance(s, float) for s in scores) else "NO SCORE"
    if status in {429, 503} and "Retry-After" not in headers:
        return f"{status} WITHOUT RETRY-AFTER"
    return str(status) if body["error"]["message"] else f"{status} WITHOUT A REASON"


def warm_up(address: str, kind: Kind) -> None:
    asyncio.run(load(address, kind, clients=4, seconds=1))


def batching(reward_model: Path, seconds: float) -> list[list[str]]:
    """Rows: request, clients, way of scoring, requests/s, how much faster shared batches are, p50, p95, outcomes."""
    found: dict[tuple[Kind, int, str], Load] = {}
    with policy() as (name, _, _):
        for way, options in WAYS.items():
            with best_of_n(name, reward_model, *options) as address:
                for kind in KINDS:
                    warm_up(address, kind)
                    for clients in (16, 64):
                        found[kind, clients, way] = asyncio.run(load(address, kind, clients=clients, seconds=seconds))
    rows = []
    for kind, clients in itertools.product(KINDS, (16, 64)):
        for way in WAYS:
            run = found[kind, clients, way]
            gain = found[kind, clients, "shared batches"].per_second / max(run.per_second, 1e-9)
            times = [f"{run.per_second:.1f}", f"{gain:.1f}", f"{run.percentile_ms(0.5):.0f}"]
            rows.append([kind.name, str(clients), way, *times, f"{run.percentile_ms(0.95):.0f}", outcomes(run)])
    return rows


def outcomes(run: Load) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(run.statuses.items()))


def overload(reward_model: Path, seconds: float) -> list[str]:
    with policy() as (name, _, _), best_of_n(name, reward_model) as address:
        warm_up(address, CHAT)
        run = asyncio.run(load(address, CHAT, clients=256, seconds=seconds))
    if set(run.statuses) - {"200", "429"}:
        raise SystemExit(f"256 clients saw more than 200 and 429: {outcomes(run)}")
    return [
        "256",
        f"{run.per_second:.1f}",
        f"{run.percentile_ms(0.5):.0f}",
        f"{run.percentile_ms(0.95):.0f}",
        outcomes(run),
    ]


def restart(reward_model: Path) -> list[str]:
    """The policy is killed after 2 s and back after 5; the run ends after 9."""
    with policy() as (name, kill, again), best_of_n(name, reward_model) as address:
        warm_up(address, CHAT)
        back = 0.0

        async def during() -> None:
            nonlocal back
            start = time.monotonic()
            await asyncio.sleep(2)
            kill()
            await asyncio.sleep(3)
            await asyncio.to_thread(again)
            back = time.monotonic() - start

        run = asyncio.run(load(address, CHAT, clients=16, seconds=9, during=during))
    if set(run.statuses) - {"200", "503"}:
        raise SystemExit(f"with the policy killed, clients saw more than 200 and 503: {outcomes(run)}")
    resumed = min((at for at, outcome in run.timeline if outcome == "200" and at > back), default=None)
    if resumed is None:
        raise SystemExit("service did not resume")
    first = min(at for at, outcome in run.timeline if outcome == "503")
    return [outcomes(run), f"{first - 2:.2f}", f"{resumed - back:.2f}"]


def show(title: str, header: list[str], rows: list[list[str]], *, markdown: bool) -> None:
    print(f"\n{title}\n")
    if markdown:
        print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        model = small_reward_model(Path(folder))
        header = ["request", "clients", "scoring", "requests/s", "shared is faster by", "p50 ms", "p95 ms", "outcomes"]
        rows = batching(model, arguments.seconds)
        show("Scoring", header, rows, markdown=arguments.markdown)
        rows = [overload(model, arguments.seconds)]
        show("Overload", ["clients", "requests/s", "p50 ms", "p95 ms", "outcomes"], rows, markdown=arguments.markdown)
        rows = [restart(model)]
        header = ["outcomes", "s from the kill to the first 503", "s from the restart to the first 200"]
        show("Policy killed and restarted, 16 clients", header, rows, markdown=arguments.markdown)


if __name__ == "__main__":
    main()
