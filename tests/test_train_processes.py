"""Two processes (torchrun, gloo, CPU) train as one: compared with a single process of the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights

from sotopia_rl.errors import ConfigError
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.reward_model import train_reward_model
from sotopia_rl.train.trl_grpo import passes_per_step
from training_settings import GRPO, RM

TESTS = Path(__file__).parent
SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_settings import GRPO, RM, SFT

stage, rows, base, sft, rm, out, batch, stop_at = sys.argv[1], *map(Path, sys.argv[2:7]), *map(int, sys.argv[7:9])
digests = []

def digest(optimizer, args, kwargs):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    digests.append(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parameters)).hexdigest())

def progress(done, total):
    assert os.environ.get("RANK", "0") == "0", "only the main process reports"
    if done == stop_at:
        os._exit(3)

register_optimizer_step_post_hook(digest)
if stage == "sft":
    from sotopia_rl.train.sft import train_sft
    settings = SFT.model_copy(update={"batch_size": batch, "lora_dropout": 0.0})
    train_sft(rows, base, settings, out, progress=progress)
elif stage == "rm":
    from sotopia_rl.train.reward_model import train_reward_model
    settings = RM.model_copy(update={"batch_size": batch})
    train_reward_model(rows, base, settings, out, progress=progress)
else:
    from sotopia_rl.train.grpo import train_grpo
    settings = GRPO.model_copy(update={"batch_size": batch})
    hook = lambda step, policy: {"score": float(step), "rank": int(os.environ.get("RANK", "0"))}
    train_grpo(rows, base, sft, rm, settings, out, progress=progress, eval_hook=hook)
name = f"digests-{os.environ.get('RANK', '0')}.json"
(out / name).write_text(json.dumps(digests))
"""


def run(stage: str, inputs: list[Path], out: Path, *, processes: int, batch: int, stop_at: int = 0) -> None:
    out.mkdir(parents=True, exist_ok=True)
    script = out / "script.py"
    script.write_text(SCRIPT)
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    command = [sys.executable, *launcher, str(script), stage, *map(str, [*inputs, out]), str(batch), str(stop_at)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert (done.returncode == 0) == (stop_at == 0), done.stderr[-4000:]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_a_step_that_the_processes_cannot_share_evenly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes_per_step(GRPO) == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"\(8\) must be a multiple of batch_size x processes \(8 x 3\)"):
        passes_per_step(GRPO)


def test_a_reward_model_on_divided_weights_is_refused_before_it_starts(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="needs whole weights"):
        train_reward_model(rows, base, RM, tmp_path)


DIVIDED = """
import os, sys
from pathlib import Path
import torch
from peft import PeftModel, load_peft_weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from sotopia_rl.train.adapters import saver

base, adapter, out = map(Path, sys.argv[1:4])
mesh = init_device_mesh("cpu", (2,))
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
for layer in model.get_base_model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
os.environ["ACCELERATE_USE_FSDP"] = "true"
saver(model)(out)
torch.distributed.barrier()
ours, theirs = load_peft_weights(str(out)), load_peft_weights(str(adapter))
assert ours.keys() == theirs.keys()
assert all(torch.equal(ours[name], theirs[name]) for name in ours)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_weights_that_are_divided_among_processes_are_saved_whole(
    base: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    """PyTorch's fully_shard by itself: accelerate runs no FSDP on CPUs."""
    (tmp_path / "script.py").write_text(DIVIDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "script.py"), str(base), str(sft_adapter), str(tmp_path / "saved")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_two_processes_learn_what_one_with_their_global_batch_learns(
    stage: str, rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    inputs = [rows, base, sft_adapter, reward_adapter]
    run(stage, inputs, tmp_path / "one", processes=1, batch=8)
    run(stage, inputs, tmp_path / "two", processes=2, batch=4)
    one, two = (load_peft_weights(str(tmp_path / name / "adapter")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "grpo"])
def test_two_processes_agree_write_once_and_resume_exactly(
    stage: str, rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    inputs = [rows, base, sft_adapter, reward_adapter]
    run(stage, inputs, tmp_path / "unbroken", processes=2, batch=4)
    digests = [json.loads((tmp_path / f"unbroken/digests-{rank}.json").read_text()) for rank in (0, 1)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(digests[0]) > 2
    steps = [line["step"] for line in read_metrics(tmp_path / "unbroken/metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "one process wrote, once"
    if stage == "grpo":
        judged = [line for line in read_metrics(tmp_path / "unbroken/metrics.jsonl") if "eval_rank" in line]
        assert [line["eval_rank"] for line in judged] == [0, 0], "the judge is asked in the main process"

    run(stage, inputs, tmp_path / "broken", processes=2, batch=4, stop_at=3)
    assert not (tmp_path / "broken/finished.json").exists()
    run(stage, inputs, tmp_path / "broken", processes=2, batch=4)
    unbroken, resumed = (load_peft_weights(str(tmp_path / name / "adapter")) for name in ("unbroken", "broken"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
