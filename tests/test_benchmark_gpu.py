"""The benchmark for GPUs, on the CPU at a size that a laptop has, so that it is whole when a GPU is to be had."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sotopia_rl.train.memory import QWEN25_7B

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_the_count_of_flops_is_that_of_the_arithmetic() -> None:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    linear = 4 * 4096 * (6_525_288_448 + 152064 * 3584)  # every weight that multiplies: layers and output layer
    attention = 6 * 28 * 3584 * 4096 * 4096
    assert gpu.flops(QWEN25_7B, 4096) == linear + attention


@pytest.mark.slow
def test_every_line_of_the_table_can_be_measured() -> None:
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--device", "cpu", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| sft", "| rm", "| grpo"))]
    assert [line.split("|")[1].strip() for line in lines] == ["sft", "rm", "grpo"] * 2
    assert all(re.search(r"tokens/s|samples/s|s/step", line) for line in lines)
