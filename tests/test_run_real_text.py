"""The smoke recipe: published profiles and a real chat model through every stage, shortened to what CI has time for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from real_vllm import needs_smollm2
from sotopia_data import FOLDER, needs_sotopia_data
from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS

RECIPE = Path(__file__).parents[1] / "recipes" / "sotopia-smoke.yaml"
ATTRIBUTED = ("goal", "relationship", "knowledge")


@pytest.mark.slow
@needs_smollm2
@needs_sotopia_data
def test_published_profiles_go_through_every_stage_with_a_real_model(tmp_path: Path) -> None:
    few = tmp_path / "few.yaml"
    few.write_text(json.dumps({"dimensions": [d.model_dump() for d in SOTOPIA_DIMENSIONS if d.name in ATTRIBUTED]}))
    shorter = {
        "extends": str(RECIPE),
        "world": {"train_matches": 2},
        "simulate": {"max_turns": 2},
        "judge": {"dimensions": str(few), "max_reason_chars": 10, "max_tokens": 300},
        "sft": {"max_steps": 1},
        "rm": {"max_steps": 1},
    }
    recipe, output = tmp_path / "shorter.yaml", tmp_path / "run"
    recipe.write_text(json.dumps(shorter))
    command = [sys.executable, "-m", "sotopia_rl.cli", "run", str(recipe)]
    done = subprocess.run(
        [*command, "--profiles", str(FOLDER), "--output", str(output)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "16/16 report" in done.stderr
    assert "these scores mean nothing" in " ".join(done.stdout.split())
    results = json.loads((output / "results.json").read_text())
    compared = {(row["system_a"], row["system_b"]) for row in results["rows"]}
    assert compared == {("sft", "base"), ("grpo", "sft")}
    assert (next(output.glob("stages/grpo-*")) / "adapter" / "adapter_model.safetensors").is_file()
