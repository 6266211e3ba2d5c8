"""Step 3 with real parts: a real chat model with an SFT and a GRPO adapter on one vLLM, best-of-N beside it, compared.

The adapters have seen a step or two, so that the scores mean nothing; what is tested is that the parts fit together and
that whatever becomes of an episode is accounted for.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from real_vllm import VLLM, needs_smollm2, needs_vllm
from sotopia_rl.serve.vllm import free_port
from sotopia_rl.store import open_store

pytestmark = [pytest.mark.slow, needs_vllm, needs_smollm2]

BASE = ["--base", "smollm2"]
COMPACT = ["--prompt-profile", "compact"]
SHORT = ["--learning-rate", 2e-4, "--max-steps", 2, "--batch-size", 2, "--max-length", 400]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "sotopia_rl.cli", *map(str, words)]


def run(*words: object) -> str:
    done = subprocess.run(command(*words), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def serving(*words: object) -> Iterator[subprocess.Popen[str]]:
    """A server, once it has said on standard output that it answers."""
    process = subprocess.Popen(command("serve", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline(), process.communicate()[1][-3000:]
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SFT, reward and GRPO adapters of SmolLM2, by the commands a person would call."""
    home = tmp_path_factory.mktemp("adapters")
    store = ["--store", home / "episodes.db", "--tag", "t"]
    cast = ["--agent1", "scripted/fair", "--agent2", "scripted/rude", "--judge", "scripted/judge"]
    run("simulate", "--manifest", "sandbox-train", "--count", 4, *cast, *COMPACT, "--max-turns", 6, *store)
    dimensions = [word for name in ("goal", "relationship", "knowledge") for word in ("--dimensions", name)]
    run("annotate", *store, "--annotator", "scripted/annotator", *dimensions)
    run("reward", *store, "--output", home / "rows")
    rewards = home / "rows" / "reward.jsonl"
    run("sft", "--rows", home / "rows" / "sft.jsonl", *BASE, *SHORT, "--held-out-share", 0, "--output", home / "sft")
    run("rm", "--rows", rewards, *BASE, *SHORT, "--held-out-share", 0.3, "--output", home / "rm")
    sizes = ["--prompts-per-step", 2, "--num-generations", 2, "--batch-size", 4, "--max-steps", 1]
    lengths = ["--max-prompt-length", 400, "--max-completion-length", 24]
    given = ["--prompts", rewards, "--policy", home / "sft" / "adapter", "--reward-model", home / "rm" / "adapter"]
    run("grpo", *given, *BASE, *sizes, *lengths, "--gate-min-spearman", -1, "--output", home / "grpo")
    return {name: home / name / "adapter" for name in ("sft", "rm", "grpo")}


def test_three_systems_on_real_servers_are_compared(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    ports = [free_port("127.0.0.1", 0) for _ in range(2)]
    policies, best = (f"http://127.0.0.1:{port}/v1" for port in ports)
    served = [word for name in ("sft", "grpo") for word in ("--adapter", f"{name}={adapters[name]}")]
    small = ["--dtype", "float32", "--max-model-len", 1024, "--cpu-cache-gigabytes", 1, "--enforce-eager"]
    small += ["--no-chunked-prefill"]  # with it vLLM 0.32 dies of requests with seeds
    place = ["--python", VLLM, "--port", ports[0], "--log", tmp_path / "vllm.log"]
    chooser = ["--policy", f"custom/sft@{policies}", "--reward-model", adapters["rm"], "-n", 3, "--port", ports[1]]
    systems = {
        "sft": f"custom/sft@{policies}",
        "grpo": f"custom/grpo@{policies}",
        "best-of-3": f"custom/best-of-n@{best}",
    }
    asked = [word for name, model in systems.items() for word in ("--system", f"{name}={model}")]
    world = ["--manifest", "sandbox-held-out", "--count", 3, "--partner", "scripted/fair", "--judge", "scripted/judge"]
    limits = ["--max-turns", 4, "--max-tokens", 40, "--timeout-seconds", 300, "--concurrency", 3]
    out = tmp_path / "evaluation"
    with (
        serving("vllm", *BASE, *served, *small, *place),
        serving("best-of-n", *chooser, "--policy-timeout-seconds", 300),
    ):
        run("evaluate", "play", *world, *asked, *COMPACT, *limits, "--output", out)
    for name in systems:
        with open_store(out / f"{name}.db") as store:
            episodes = list(store.episodes())
            judged = {rating.episode_id for rating in store.ratings()}
        assert len(episodes) == 3
        assert judged == {episode.id for episode in episodes if episode.failure is None}
        assert all(turn.action is not None for episode in episodes for turn in episode.turns)
    results = json.loads((out / "results.json").read_text())
    assert {system["system"] for system in results["systems"]} == set(systems)
    goals = [row for row in results["rows"] if row["metric"] == "goal"]
    assert [row["num_pairs"] + row["num_excluded"] for row in goals] == [3, 3]
    assert (out / "report.html").stat().st_size > 10_000
