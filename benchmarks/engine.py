"""Our engine beside the published sotopia 0.1.4 and 0.1.5: CPU per model call, episodes per second, memory.

    python benchmarks/engine.py                 a few minutes; what is not installed is skipped, and it says so
    python benchmarks/engine.py --install       first make the published packages' environments (tests/oracle)
    python benchmarks/engine.py --quick         our engine only, small
    python benchmarks/engine.py --markdown      the table as Markdown, for docs/benchmarks.md

Every engine runs in a process of its own against a local model server (engines/model_server.py): the same two people
in the same scenario, 20 turns and one judgement an episode. CPU is the time of the engine's process, from the first
call to the last, imports left out, over the calls that the server counted, with replies that take no time. Episodes
per second are measured with replies that take 50 ms; ideal is an engine that takes no time itself. Runs are repeated
and the best counts, because others use the machine too; CPU per call is the figure to trust, and even that doubles on
a crowded machine: the row "aiohttp alone" (the same calls, no engine) tells how crowded it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINES = Path(__file__).parent / "engines"
sys.path.insert(0, str(ROOT / "tests"))

CALLS_PER_EPISODE = 21
DELAY_SECONDS = 0.05
PUBLISHED = {"sotopia 0.1.4": "sotopia014", "sotopia 0.1.5": "sotopia015"}

PERSON = {
    "age": 37,
    "occupation": "Bicycle mechanic",
    "gender": "Woman",
    "gender_pronoun": "She/her",
    "public_info": "Runs a workshop by the station with two apprentices and plays the viola on Thursdays. " * 3,
    "personality_and_values": "Patient with machines and less so with people; holds fairness above comfort. " * 4,
    "secret": "Has agreed to sell the workshop and has told nobody who works there. " * 2,
}
MATCH = {
    "characters": [
        {"first_name": "Ida", "last_name": "Berg", **PERSON},
        {"first_name": "Noor", "last_name": "Haddad", **PERSON},
    ],
    "scenario": {
        "description": "Two acquaintances meet in a workshop to agree on the price of a restored touring bicycle. " * 3,
        "goals": [
            "Sell the bicycle for at least 900, and stay on good terms. (Extra information: the parts cost 500.) " * 3,
            "Buy the bicycle for at most 700, delivery included. (Extra information: another shop asks 800.) " * 3,
        ],
        "relationship": 2,
    },
}


@dataclass(frozen=True)
class Figures:
    """What one run took."""

    calls: int
    seconds: float
    cpu_seconds: float
    peak_mb: float

    @property
    def cpu_ms_per_call(self) -> float:
        return 1000 * self.cpu_seconds / self.calls


Job = dict[str, object]
Engine = Callable[[Job], dict[str, float]]


def in_this_environment(script: str, job: Job) -> dict[str, float]:
    command = [sys.executable, str(ENGINES / script), json.dumps(job)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def published_engine(python: Path, redis_url: str, job: Job) -> dict[str, float]:
    own = {"REDIS_OM_URL": redis_url, "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "figures.json", Path(folder) / "log"
        command = [str(python), str(ENGINES / "published.py"), json.dumps(job), str(result)]
        with log.open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=output, env={**os.environ, **own}, cwd=folder, check=False
            )
        if not result.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{python}: exit code {code.returncode}, no figures; its last words:\n{tail}")
        return json.loads(result.read_text())


@contextmanager
def model_server(delay_seconds: float) -> Iterator[str]:
    """The URL of a server while it runs."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        command = [sys.executable, str(ENGINES / "model_server.py"), str(port_file), "--delay", str(delay_seconds)]
        server = subprocess.Popen(command)
        try:
            for _ in range(200):
                if port_file.exists():
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{int(port_file.read_text())}/v1"
        finally:
            server.terminate()
            server.wait()


def run(engine: Engine, url: str, *, at_once: int, episodes: int) -> Figures:
    counter = url.removesuffix("/v1") + "/calls"
    urllib.request.urlopen(counter).read()  # noqa: S310 - our own server
    figures = engine({"url": url, "at_once": at_once, "episodes": episodes, "match": MATCH})
    calls = int(urllib.request.urlopen(counter).read())  # noqa: S310
    if calls < 0.9 * CALLS_PER_EPISODE * episodes:
        raise RuntimeError(f"{calls} calls for {episodes} episodes: the engine did not play them")
    return Figures(calls, **figures)


@dataclass(frozen=True)
class Row:
    """One engine at one number of matches at once."""

    engine: str
    at_once: int
    cpu_ms: float | None = None
    rate: float | None = None
    peak_mb: float | None = None

    @property
    def ideal(self) -> float:
        return self.at_once / (CALLS_PER_EPISODE * DELAY_SECONDS)

    def cells(self) -> list[str]:
        return [
            self.engine,
            str(self.at_once),
            "" if self.cpu_ms is None else f"{self.cpu_ms:.2f}",
            "" if self.rate is None else f"{self.rate:.2f}",
            "" if self.rate is None else f"{self.rate / self.ideal:.0%}",
            "" if self.peak_mb is None else f"{self.peak_mb:.0f}",
        ]


HEADINGS = ["engine", "at once", "CPU ms per call", "episodes/s at 50 ms", "of ideal", "peak MB"]


def measure(
    name: str, engine: Engine, fast: str, slow: str, *, at_once: list[int], per_place: int, repeats: int
) -> Iterator[Row]:
    for places in at_once:
        quick, waiting = _episodes(places, per_place)
        cpu = [run(engine, fast, at_once=places, episodes=quick) for _ in range(repeats)] if places <= 256 else []
        timed = [run(engine, slow, at_once=places, episodes=waiting) for _ in range(repeats)]
        yield Row(
            name,
            places,
            min((f.cpu_ms_per_call for f in cpu), default=None),
            waiting / min(f.seconds for f in timed),
            max(f.peak_mb for f in [*cpu, *timed]),
        )


def _episodes(at_once: int, per_place: int) -> tuple[int, int]:
    """Episodes per run without and with delay: enough to be steady, few enough to end."""
    if per_place == 1:
        return max(at_once, 3), max(at_once, 2)
    return max(at_once * 2, 200), at_once * per_place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--quick", action="store_true", help="our engine only, at 1 and 64, once")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours per figure, of which the best counts")
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--published-at-once", type=int, nargs="*", default=[1, 16, 64])
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.at_once, arguments.published_at_once, arguments.repeats = [1, 64], [], 1
    if arguments.install:
        script = ROOT / "tests/oracle/install.py"
        subprocess.run([sys.executable, str(script), "redis", *PUBLISHED.values()], check=True)

    rows: list[Row] = []
    skipped: list[str] = []
    with ExitStack() as stack:
        fast, slow = (stack.enter_context(model_server(delay)) for delay in (0.0, DELAY_SECONDS))
        progress = partial(print, file=sys.stderr, flush=True)
        for name, script in {"aiohttp alone": "bare.py", "ours": "ours.py"}.items():
            engine = partial(in_this_environment, script)
            for row in measure(
                name, engine, fast, slow, at_once=arguments.at_once, per_place=4, repeats=arguments.repeats
            ):
                rows.append(row)
                progress("  ".join(row.cells()))
        redis_url = start_redis(stack) if arguments.published_at_once else None
        for name, home in PUBLISHED.items():
            python = ROOT / ".venvs" / home / "bin/python"
            missing = [] if redis_url else ["a Redis with JSON and search"]
            missing += [] if python.exists() else [f".venvs/{home}"]
            if not arguments.published_at_once:
                continue
            if missing:
                skipped.append(f"{name}: needs {' and '.join(missing)}; see --install")
                continue
            engine = partial(published_engine, python, redis_url)
            try:
                for row in measure(
                    name, engine, fast, slow, at_once=arguments.published_at_once, per_place=1, repeats=1
                ):
                    rows.append(row)
                    progress("  ".join(row.cells()))
            except RuntimeError as error:
                skipped.append(f"{name}: {error}")
    report(rows, skipped, markdown=arguments.markdown)


def start_redis(stack: ExitStack) -> str | None:
    """A Redis for the published packages, which cannot end an episode without one; None where there is none."""
    from real_redis import MODULES, found, redis_server

    if any(found(name) is None for name in ("redis-server", *MODULES)):
        return None
    return stack.enter_context(redis_server())


def report(rows: list[Row], skipped: list[str], *, markdown: bool) -> None:
    table = [HEADINGS, *(row.cells() for row in rows)]
    if markdown:
        table.insert(1, ["---"] * len(HEADINGS))
        print("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    else:
        widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADINGS))]
        print("\n".join("  ".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)) for cells in table))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{os.cpu_count()} CPUs, load {load}, Python {platform.python_version()}, commit {commit()}")
    for line in skipped:
        print(f"skipped: {line}")


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
