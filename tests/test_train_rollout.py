"""GRPO with vLLM beside it: a stand-in server that samples from the real adapters, over real HTTP."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, load_peft_weights
from transformers import AutoModelForCausalLM

from fake_vllm import FakeVLLM, Sample
from sotopia_rl.errors import ConfigError, MissingExtraError, RolloutError
from sotopia_rl.train.adapters import load_policy
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.folder import RunFolder, read_metrics
from sotopia_rl.train.grpo import train_grpo
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.rollout import ColocatedRollouts, PublishedPolicies, prepare_rollouts
from training_settings import GRPO

Train = Callable[..., Path]
ONE_AT_A_TIME = threading.Lock()
"""transformers leaves tied weights out when two threads load at once."""


def sampler(base: Path) -> Sample:
    """Samples as vLLM would, from the base with the adapter that is asked for."""
    models: list[PeftModel] = []

    def model_with(adapter: Path) -> PeftModel:
        if not models:
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            models.append(PeftModel.from_pretrained(plain, adapter, adapter_name=adapter.name).eval())
        if adapter.name not in models[0].peft_config:
            models[0].load_adapter(adapter, adapter_name=adapter.name)
        models[0].set_adapter(adapter.name)
        return models[0]

    @torch.no_grad()
    def sample(adapter: Path, prompt: list[int], request: dict[str, Any]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        logprobs: list[float] = []
        with ONE_AT_A_TIME:
            model = model_with(adapter)
            while len(ids) < request["max_tokens"] and ids[-1:] != request["stop_token_ids"]:
                logits = model(torch.tensor([prompt + ids])).logits[0, -1]
                scores = torch.log_softmax(logits / request["temperature"], dim=-1)
                ids.append(int(torch.multinomial(scores.exp(), 1)))
                logprobs.append(float(scores[ids[-1]]))
        return ids, logprobs

    return sample


@pytest.fixture
def train(rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path) -> Train:
    """Trains on these servers; the result, or what a test finds in `tmp_path`."""

    def run(*servers: FakeVLLM, out: str = "run", **changes: object) -> Path:
        given = {"rollouts": "vllm_server", "vllm_urls": tuple(server.url for server in servers), "vllm_retries": 0}
        given |= {"max_completion_length": 4}
        settings = GRPOSettings.model_validate({**GRPO.model_dump(), **given, **changes})
        return train_grpo(rows, base, sft_adapter, reward_adapter, settings, tmp_path / out)

    return run


def steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "reward" in line]


def test_every_step_samples_from_the_policy_that_the_last_step_made(train: Train, base: Path, tmp_path: Path) -> None:
    with FakeVLLM(sample=sampler(base)) as one, FakeVLLM(sample=sampler(base)) as other:
        adapter = train(one, other, max_steps=3)
    for server in (one, other):
        labels = [name.split("-")[2] for name in server.loaded]
        assert labels == ["start", "000000", "000001", "000002"]
        assert len(set(server.loaded)) == 4, "each version has a name of its own"
        assert [request["model"] for request in server.requests] == server.loaded
        assert server.adapters == {}, "the servers are left as they were"
    assert not list((tmp_path / "run/served").iterdir())
    for line in steps(tmp_path / "run"):
        assert line["logprob_gap"] < 1e-4, "the version served is the version sampled"
        assert line["importance_mean"] == pytest.approx(1, abs=1e-3)
        assert line["rollout_seconds"] > 0
        assert line["sync_seconds"] > 0
    assert load_peft_weights(str(adapter))


@pytest.mark.slow
def test_the_policy_can_be_published_every_few_steps(train: Train, base: Path, tmp_path: Path) -> None:
    with FakeVLLM(sample=sampler(base)) as server:
        train(server, vllm_sync_every=2, max_steps=3)
    assert [name.split("-")[2] for name in server.loaded] == ["start", "000000", "000002"]
    fresh, old, fresh_again = [line["logprob_gap"] for line in steps(tmp_path / "run")]
    assert max(fresh, fresh_again) < 1e-4 < old, "a policy that has moved on since is corrected for"


@pytest.mark.slow
def test_probabilities_that_differ_are_corrected_for_within_the_cap(train: Train, base: Path, tmp_path: Path) -> None:
    inner = sampler(base)

    def modest(*given: Any) -> tuple[list[int], list[float]]:
        ids, logprobs = inner(*given)
        return ids, [value - 5.0 for value in logprobs]

    with FakeVLLM(sample=modest) as server:
        train(server, out="capped", max_steps=1, vllm_max_logprob_gap=None, vllm_importance_cap=2.0)
        train(server, out="none", max_steps=1, vllm_importance="none")
    (line,) = steps(tmp_path / "capped")
    assert line["logprob_gap"] == pytest.approx(5, abs=1e-3)
    assert line["importance_min"] == line["importance_max"] == 2.0
    assert "importance_mean" not in steps(tmp_path / "none")[0]


def test_a_server_with_another_model_is_found_out_before_it_teaches_anything(train: Train, tmp_path: Path) -> None:
    other_model = FakeVLLM(sample=lambda *given: ([7, 2], [-20.0, -20.0]))
    with other_model, pytest.raises(RolloutError, match=r"step 1: vLLM's .* differ .* serves another base"):
        train(other_model)
    assert not (tmp_path / "run/checkpoints/checkpoint-1").exists()


@pytest.mark.slow
def test_what_was_trained_before_a_server_died_is_kept_and_gone_on_from(
    train: Train, base: Path, tmp_path: Path
) -> None:
    first = FakeVLLM(sample=sampler(base), faults=[""] * 4 + ["500"])  # one call to try it out, two per step
    with first, pytest.raises(RolloutError, match=f"{first.url}: HTTP 500"):
        train(first, max_steps=3, save_every=100)
    assert [folder.name for folder in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "run/checkpoints/checkpoint-1/COMPLETE").is_file()
    with FakeVLLM(sample=sampler(base)) as second:  # at another address
        adapter = train(second, max_steps=3, save_every=100)
    assert [name.split("-")[2] for name in second.loaded] == ["start", "000001", "000002"]
    assert [line["step"] for line in steps(tmp_path / "run")] == [1, 2, 3]
    assert json.loads((tmp_path / "run/finished.json").read_text())["steps"] == 3
    assert adapter.is_dir()


def test_a_server_that_is_not_there_is_named_before_a_model_is_loaded(train: Train, tmp_path: Path) -> None:
    gone = FakeVLLM()
    with gone:
        pass
    with pytest.raises(RolloutError, match=f"{gone.url}: no connection"):
        train(gone)
    with FakeVLLM(max_model_len=100) as short, pytest.raises(RolloutError, match="takes sequences of 100 tokens"):
        train(short, out="short")
    with FakeVLLM(faults=["no-ids"]) as old, pytest.raises(RolloutError, match="gives no token ids"):
        train(old, out="old")


# --- settings --------------------------------------------------------------------------------------------------------


def test_servers_need_addresses_and_addresses_servers() -> None:
    with pytest.raises(ValueError, match="vllm_server needs vllm_urls"):
        GRPOSettings(rollouts="vllm_server")
    with pytest.raises(ValueError, match="not an http:// address: 'localhost:8000'"):
        GRPOSettings(rollouts="vllm_server", vllm_urls=("localhost:8000",))
    with pytest.raises(ValueError, match="in_process asks no server"):
        GRPOSettings(vllm_urls=("http://localhost:8000",))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_colocated_vllm_that_is_not_installed_is_one_line(base: Path, sft_adapter: Path, tmp_path: Path) -> None:
    settings = GRPO.model_copy(update={"rollouts": "vllm_colocate"})
    with pytest.raises(MissingExtraError, match=r"vllm is not installed; run: pip install 'sotopia-rl\[vllm\]'"):
        prepare_rollouts(settings, base, sft_adapter, load_tokenizer(base), RunFolder(tmp_path))


# --- publishing ------------------------------------------------------------------------------------------------------


def saver(text: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(text)

    return save


def published(folder: Path) -> Iterator[str]:
    return (path.name for path in sorted(folder.iterdir()))


def test_equal_names_mean_equal_weights(tmp_path: Path) -> None:
    policies = PublishedPolicies(tmp_path, "run-")
    first, again, other = (policies.publish("000001", saver(text)) for text in ("a", "a", "b"))
    assert first == again
    assert first.name != other.name
    assert first.path == (tmp_path / first.name).resolve()


def test_only_the_last_two_versions_are_kept_and_nothing_of_other_runs_is_touched(tmp_path: Path) -> None:
    stranger = PublishedPolicies(tmp_path, "other-").publish("000009", saver("x"))
    policies = PublishedPolicies(tmp_path, "run-")
    made = [policies.publish(f"{step:06d}", saver(str(step))) for step in range(4)]
    assert list(published(tmp_path)) == sorted([stranger.name, *(version.name for version in made[-2:])])
    policies.clear()
    assert list(published(tmp_path)) == [stranger.name]


def test_a_version_torn_by_a_kill_is_written_anew(tmp_path: Path) -> None:
    policies = PublishedPolicies(tmp_path, "run-")

    def torn(folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        policies.publish("000001", torn)
    assert all(name.startswith(".") for name in published(tmp_path)), "no server takes it for a policy"
    assert policies.publish("000001", saver("a")).path.is_dir()


def test_two_runs_never_share_a_name(tmp_path: Path) -> None:
    one, other = (PublishedPolicies.of(GRPO, RunFolder(tmp_path / name)) for name in ("a", "b"))
    assert one.prefix != other.prefix
    assert one.folder == tmp_path / "a/served"


def test_merging_into_four_bits_is_refused(base: Path, sft_adapter: Path, tmp_path: Path) -> None:
    settings = GRPO.model_copy(update={"rollouts": "vllm_colocate", "quantise": "nf4"})
    with pytest.raises(ConfigError, match="four-bit weights do not survive"):
        prepare_rollouts(settings, base, sft_adapter, load_tokenizer(base), RunFolder(tmp_path))


# --- colocated -------------------------------------------------------------------------------------------------------


@dataclass
class MergesLikeTRL:
    """What TRL's vLLM backend does to the model when weights are copied over."""

    model: PeftModel

    def sync_weights(self) -> None:
        self.model.merge_adapter()
        self.model.unmerge_adapter()


def test_the_frozen_base_survives_the_merging_of_a_colocated_vllm(base: Path, sft_adapter: Path) -> None:
    settings = GRPO.model_copy(update={"dtype": "bfloat16"})
    model = load_policy(base, sft_adapter, load_tokenizer(base), settings)
    frozen = {name: p.clone() for name, p in model.named_parameters()}

    def changed() -> list[str]:
        return [name for name, p in model.named_parameters() if not torch.equal(p, frozen[name])]

    seconds: dict[str, float] = {}
    rollouts = ColocatedRollouts(MergesLikeTRL(model), model, seconds.__setitem__)
    for _ in range(2):
        rollouts.sync_weights()
        assert not changed()
    assert list(seconds) == ["sync_seconds"]
    MergesLikeTRL(model).sync_weights()
    assert changed(), "it is not for nothing"


# --- two processes ---------------------------------------------------------------------------------------------------

TWO = """
import sys
from pathlib import Path
from training_settings import GRPO
from sotopia_rl.train.adapters import load_policy
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.grpo import train_grpo

rows, base, sft, rm, out = map(Path, sys.argv[2:])
given = {"rollouts": "vllm_server", "vllm_urls": [sys.argv[1]], "vllm_retries": 0, "max_completion_length": 4}
given |= {"batch_size": 4, "max_steps": 2, "save_every": 50}
settings = GRPOSettings.model_validate({**GRPO.model_dump(), **given})
train_grpo(rows, base, sft, rm, settings, out)
"""


@pytest.mark.slow
def test_two_processes_sample_each_for_itself_and_fail_together(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "two.py").write_text(TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    inputs = map(str, (rows, base, sft_adapter, reward_adapter, tmp_path / "run"))
    command = [*launcher, str(tmp_path / "two.py"), "URL", *inputs]

    def launch(server: FakeVLLM) -> subprocess.CompletedProcess[str]:
        found = [server.url if word == "URL" else word for word in command]
        return subprocess.run(found, env=environment, capture_output=True, text=True, check=False, timeout=300)

    with FakeVLLM(sample=sampler(base), faults=["", "", "", "", "500"]) as first:  # of one process, in the second step
        failed = launch(first)
    assert failed.returncode != 0
    assert failed.stderr.count(f"RolloutError: {first.url}: HTTP 500") >= 2, "both processes say why"
    assert (tmp_path / "run/checkpoints/checkpoint-1/COMPLETE").is_file()
    with FakeVLLM(sample=sampler(base)) as second:
        done = launch(second)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [name.split("-")[2] for name in second.loaded] == ["start", "000001"], "one process publishes"
    assert [request["n"] for request in second.requests] == [1, 4, 4]
    assert all(line["logprob_gap"] < 1e-4 for line in steps(tmp_path / "run"))
