"""Every training stage killed with SIGKILL in a real process, resumed, and compared with an unbroken run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights

from sotopia_rl.train.folder import read_metrics

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
SCRIPT = """
import sys
from pathlib import Path
from training_settings import GRPO, RM, SFT
stage, rows, base, sft, rm, out = sys.argv[1], *map(Path, sys.argv[2:7])
show = lambda done, total: print(done, flush=True)
if stage == "sft":
    from sotopia_rl.train.sft import train_sft
    train_sft(rows, base, SFT, out, progress=show)
elif stage == "rm":
    from sotopia_rl.train.reward_model import train_reward_model
    train_reward_model(rows, base, RM, out, progress=show)
else:
    from sotopia_rl.train.grpo import train_grpo
    train_grpo(rows, base, sft, rm, GRPO, out, progress=show)
"""


def run(stage: str, inputs: list[Path], out: Path, *, kill_at: int | None = None) -> None:
    command = [sys.executable, "-c", SCRIPT, stage, *map(str, inputs), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if kill_at is not None and int(line) == kill_at:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL)


def comparable(path: Path) -> list[dict[str, object]]:
    skipped = ("runtime", "per_second", "seconds")
    return [{k: v for k, v in line.items() if not any(s in k for s in skipped)} for line in read_metrics(path)]


@pytest.mark.parametrize(("stage", "kills"), [("sft", [3, 5]), ("rm", [1, 5]), ("grpo", [1, 3])])
def test_a_killed_stage_ends_with_the_numbers_of_an_unbroken_one(
    stage: str, kills: list[int], rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    inputs = [rows, base, sft_adapter, reward_adapter]
    run(stage, inputs, tmp_path / "unbroken")
    for step in kills:
        run(stage, inputs, tmp_path / "killed", kill_at=step)
    assert not (tmp_path / "killed/finished.json").exists()
    run(stage, inputs, tmp_path / "killed")
    unbroken, killed = (load_peft_weights(str(tmp_path / name / "adapter")) for name in ("unbroken", "killed"))
    assert all(torch.equal(unbroken[name], killed[name]) for name in unbroken)
    assert comparable(tmp_path / "killed/metrics.jsonl") == comparable(tmp_path / "unbroken/metrics.jsonl")
