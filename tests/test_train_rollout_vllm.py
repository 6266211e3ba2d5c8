"""GRPO with the real vLLM (its CPU build), as servers and in the trainer's process.

The base is a Llama whose heads are as wide as vLLM's kernels ask for, and still starts in a fraction of the time that
a published model takes.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from real_vllm import VLLM, needs_vllm, on_cpu
from sotopia_rl.dataset import PromptRow, read_rows
from sotopia_rl.errors import RolloutError
from sotopia_rl.serve.vllm import VLLMServer
from sotopia_rl.train.adapters import POLICY, load_policy, write_base_note
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.data import encode_rows
from sotopia_rl.train.folder import RunFolder, read_metrics
from sotopia_rl.train.grpo import train_grpo
from sotopia_rl.train.loading import load_base, load_tokenizer
from sotopia_rl.train.reward_model import train_reward_model
from sotopia_rl.train.rollout import PublishedPolicies
from sotopia_rl.train.sft import train_sft
from sotopia_rl.train.tiny import train_base
from sotopia_rl.train.vllm_servers import Request, VLLMServers
from training_settings import GRPO, RM, SFT, TINY

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, needs_vllm]
CPU = on_cpu(logprobs="processed")
STEPS = 3


@pytest.fixture(scope="module")
def models(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, SFT adapter and reward adapter."""
    out = tmp_path_factory.mktemp("wide")
    wide = TINY.model_copy(update={"hidden_size": 128})
    base = train_base(rows, wide, out / "base")
    return {
        "base": base,
        "sft": train_sft(rows, base, SFT, out / "sft"),
        "reward": train_reward_model(rows, base, RM, out / "reward"),
    }


@pytest.fixture(scope="module", autouse=True)
def _few_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with VLLMServer(models["base"], {}, CPU, log=log) as running:
        yield running


def settings(**changes: Any) -> GRPOSettings:
    given = {"rollouts": "vllm_server", "max_completion_length": 16, "max_steps": STEPS, "vllm_retries": 0}
    return GRPOSettings.model_validate({**GRPO.model_dump(), **given, **changes})


def train(models: dict[str, Path], rows: Path, chosen: GRPOSettings, out: Path, **options: Any) -> Path:
    return train_grpo(rows, models["base"], models["sft"], models["reward"], chosen, out, **options)


def steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "reward" in line]


def random_policy(base: Path, folder: Path, *, seed: int) -> None:
    """An adapter that changes what the base says a lot."""
    tokenizer = load_tokenizer(base)
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load_base(base, tokenizer, GRPO), config, adapter_name=POLICY)
    model.save_pretrained(folder)
    write_base_note(folder, base)


def greedy(base: Path, adapter: Path, prompt: list[int], count: int) -> list[int]:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, adapter, tokenizer, GRPO).eval()
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=tokenizer.eos_token_id,
        )
    ids: list[int] = found[0, len(prompt) :].tolist()
    return ids


def test_a_published_policy_says_what_it_says_in_process_and_another_one_something_else(
    models: dict[str, Path], rows: Path, server: VLLMServer, tmp_path: Path
) -> None:
    base, tokenizer = models["base"], load_tokenizer(models["base"])
    encoded = encode_rows(tokenizer, list(read_rows(PromptRow, rows))[:4], max_length=512)
    requests = [Request(tuple(row.prompt_ids), 1) for row in encoded]
    servers = VLLMServers(
        (server.url,), tokenizer.eos_token_id, vocabulary=len(tokenizer), max_tokens=16, temperature=0.0, retries=0
    )
    published = PublishedPolicies(tmp_path / "served", "test-")
    said = []
    for seed in (1, 2):
        random_policy(base, tmp_path / str(seed), seed=seed)
        version = published.publish(str(seed), lambda to, seed=seed: (tmp_path / str(seed)).rename(to))  # type: ignore[misc]
        servers.load(version)
        said.append([group[0].token_ids for group in servers.sample(version, requests)])
        assert said[-1] == [greedy(base, version.path, row.prompt_ids, 16) for row in encoded]
    assert said[0] != said[1]
    servers.unload_others("test-", None)


def test_each_step_samples_from_the_weights_of_the_last_one(
    models: dict[str, Path], rows: Path, server: VLLMServer, tmp_path: Path
) -> None:
    chosen = settings(vllm_urls=(server.url,), temperature=0.8, learning_rate=1e-2)
    train(models, rows, chosen, tmp_path / "run")
    stale = settings(vllm_urls=(server.url,), learning_rate=1e-2, vllm_sync_every=STEPS, vllm_max_logprob_gap=None)
    train(models, rows, stale, tmp_path / "stale")
    assert all(line["logprob_gap"] < 1e-4 for line in steps(tmp_path / "run"))
    assert steps(tmp_path / "run")[-1]["kl"] > 0
    assert steps(tmp_path / "stale")[-1]["logprob_gap"] > 1e-3, "what the check would see of stale weights"


def test_a_run_whose_server_was_killed_goes_on_with_another_one(
    models: dict[str, Path], rows: Path, server: VLLMServer, tmp_path: Path
) -> None:
    raw = CPU.model_copy(update={"logprobs": "raw"})
    mortal = VLLMServer(models["base"], {}, raw, log=tmp_path / "vllm.log").__enter__()

    def kill(done: int, total: int) -> None:
        if done == 2:
            mortal.stop()

    def go_on_with(url: str, *, temperature: float = 1.0, **options: Any) -> None:
        chosen = settings(vllm_urls=(url,), save_every=50, temperature=temperature)
        train(models, rows, chosen, tmp_path / f"at-{temperature}", **options)

    try:
        with pytest.raises(RolloutError, match="--logprobs-mode processed_logprobs"):
            go_on_with(mortal.url, temperature=0.8)
        with pytest.raises(RolloutError, match=mortal.url):
            go_on_with(mortal.url, progress=kill)
    finally:
        mortal.stop()
    with pytest.raises(RolloutError, match=f"{mortal.url}: no connection"):
        go_on_with(mortal.url)
    assert RunFolder(tmp_path / "at-1.0").last_checkpoint() == tmp_path / "at-1.0/checkpoints/checkpoint-2"
    go_on_with(server.url)
    assert [line["step"] for line in steps(tmp_path / "at-1.0")] == [1, 2, 3]


COLOCATE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from training_settings import GRPO
from sotopia_rl.train.grpo import train_grpo

def main(rows, base, sft, reward, out):
    frozen = load_file(base / "model.safetensors")

    def look(step, policy):
        named = {name.removeprefix("base_model.model."): p for name, p in policy.model.named_parameters()}
        kept = {name.replace(".base_layer", ""): p for name, p in named.items() if "lora_" not in name}
        assert kept.keys() == frozen.keys()
        assert all(torch.equal(p, frozen[name]) for name, p in kept.items()), "the base has moved"
        return {"score": 0.0}

    update = {"rollouts": "vllm_colocate", "max_completion_length": 16, "max_steps": 2, "eval_every": 1}
    train_grpo(rows, base, sft, reward, GRPO.model_copy(update=update), out, eval_hook=look)

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
"""


def test_a_colocated_vllm_samples_and_leaves_the_frozen_base_as_it_was(
    models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{Path(__file__).parent}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    script = tmp_path / "colocate.py"
    script.write_text(COLOCATE)
    inputs = [rows, models["base"], models["sft"], models["reward"], tmp_path / "run"]
    found = subprocess.run([VLLM, script, *inputs], env=environment, capture_output=True, text=True, check=False)
    if "No module named 'trl'" in found.stderr:
        pytest.skip("no trl beside vLLM in .venvs/vllm (make oracles ORACLES=vllm installs both)")
    assert found.returncode == 0, found.stderr[-3000:]
    for line in steps(tmp_path / "run"):
        assert line["logprob_gap"] < 0.2
        assert line["sync_seconds"] > 0
