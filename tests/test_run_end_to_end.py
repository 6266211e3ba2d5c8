"""The whole line through the real command at toy size: twice, changed, and killed in every stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOY = """
name: toy
world: {train_matches: 60, held_out_matches: 8, validation_matches: 4, families: [price]}
cast: {speakers: {scripted/fair: 1, scripted/generous: 1}}
simulate: {prompt_profile: compact, max_turns: 8}
base: {tiny: {max_steps: 120, save_every: 40, hidden_size: 64, layers: 2, mlp_size: 128, vocabulary: 700}}
sft: {max_steps: 6, save_every: 2, eval_every: 6, batch_size: 4, learning_rate: 1.0e-3, max_length: 400}
explore: {matches: 10, max_tokens: 40}
rm: {max_steps: 6, save_every: 2, eval_every: 6, batch_size: 4, learning_rate: 1.0e-3, max_length: 400}
grpo:
  {max_steps: 3, save_every: 1, eval_every: 1, prompts_per_step: 2, num_generations: 2, batch_size: 4,
   max_prompt_length: 400, max_completion_length: 24, gate_min_spearman: null, on_collapse: ignore}
evaluate: {partners: [scripted/fair], max_tokens: 40, shown_episodes: 2}
"""

pytestmark = pytest.mark.slow


def command(recipe: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "sotopia_rl.cli", "run", str(recipe), "--output", str(output)]


def run(recipe: Path, output: Path, *options: str) -> str:
    done = subprocess.run([*command(recipe, output), *options], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows_of(output: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((output / "results.json").read_text())["rows"]
    return rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    path.write_text(TOY)
    return path


@pytest.fixture(scope="module")
def unbroken(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    run(recipe, output)
    return output


def test_the_line_ends_with_results_and_a_report(unbroken: Path) -> None:
    compared = {(row["system_a"], row["system_b"], row["setting"]) for row in rows_of(unbroken)}
    assert compared == {(a, b, s) for a, b in (("sft", "base"), ("grpo", "sft")) for s in ("sampled", "greedy")}
    wanted = {"system_a", "system_b", "num_pairs", "mean_a", "mean_b", "difference", "low", "high"}
    assert wanted <= rows_of(unbroken)[0].keys()
    page = (unbroken / "report.html").read_text()
    assert "grpo" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (unbroken / "report.md").read_text().startswith("# toy")


def test_a_second_run_does_nothing_and_a_changed_setting_redoes_what_depends_on_it(
    unbroken: Path, recipe: Path, tmp_path: Path
) -> None:
    assert run(recipe, unbroken).count("finished") == 19
    changed = tmp_path / "changed.yaml"
    changed.write_text(f"extends: {recipe}\ngrpo: {{learning_rate: 1.0e-4}}\n")
    again = run(changed, tmp_path / "changed", "--stages", str(unbroken / "stages"))
    redone = [line.split()[1] for line in again.splitlines() if "/19" in line and "finished" not in line]
    assert redone == ["grpo", "play", "compare", "report"]


def test_killed_in_every_stage_and_resumed_it_ends_with_the_same_numbers(
    unbroken: Path, recipe: Path, tmp_path: Path
) -> None:
    for stage in ("simulate", "base", "sft", "explore", "annotate", "rm", "grpo", "play"):
        process = subprocess.Popen(command(recipe, tmp_path), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(f"stages/{stage}-*")):
            time.sleep(0.02)
        time.sleep(0.4)
        assert process.poll() is None, f"it ended before {stage} could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run(recipe, tmp_path)
    assert rows_of(tmp_path) == rows_of(unbroken)
