"""The pipeline's commands, one after the other, at toy size: scripted people and a random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sotopia_rl.cli import main
from sotopia_rl.train.config import TinyModelSettings
from tiny_llm import save_model

DATA = ["--tag", "demo"]


def call(*arguments: object) -> None:
    """Run a command as the shell would, in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code in (None, 0)


def refused(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with judged and annotated episodes, and the training rows made of them."""
    folder = tmp_path_factory.mktemp("line")
    store = ["--store", folder / "episodes.db"]
    speakers = ["--agent1", "scripted/fair", "--agent2", "scripted/leaky", "--prompt-profile", "compact"]
    call("simulate", "--manifest", "sandbox-train", "--count", 12, *speakers, *DATA, *store, "--max-turns", 8)
    call("judge", "--judge", "scripted/judge", *DATA, *store)
    call("annotate", "--annotator", "scripted/annotator", *DATA, *store)
    call("reward", "--output", folder / "rows", *DATA, *store)
    return folder / "rows"


def test_the_data_commands_end_in_training_rows(rows: Path) -> None:
    row = json.loads((rows / "reward.jsonl").read_text().splitlines()[0])
    assert row["prompt"][0]["content"].startswith("You are ")
    assert json.loads(row["completion"][0]["content"]).keys() == {"action_type", "argument"}
    assert 0 <= row["value"] <= 10
    assert set(row["values"]) == {"goal", "relationship", "knowledge"}
    assert (rows / "sft.jsonl").read_text().count("\n") == (rows / "reward.jsonl").read_text().count("\n")
    assert json.loads((rows / "provenance.json").read_text()) == {"judge": "scripted/judge", "attribution": "direct"}


def test_a_full_disk_leaves_all_the_files_of_an_older_reward(rows: Path, tmp_path: Path) -> None:
    store = rows.parent / "read-only.jsonl"  # SQLite needs room beside its file to be read
    call("episodes", "export", store, "--store", rows.parent / "episodes.db")
    again = ["reward", "--output", tmp_path, *DATA, "--store", store]
    call(*again)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limit = len(before["rewards.jsonl"]) + 1000  # reward.jsonl is larger
    assert limit < len(before["reward.jsonl"])
    program = (
        "import resource, sys; from sotopia_rl.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), {2**30}))\n"
        "main(sys.argv[2:])"
    )
    for size in (1000, limit):
        command = [sys.executable, "-c", program, str(size), *map(str, again), "--weights.goal", "3"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "cannot be written (File too large); free some space or give another path, and run again" in run.stderr
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def made_base(rows: Path, folder: Path) -> Path:
    from sotopia_rl.train.tiny import train_base

    size = TinyModelSettings(max_steps=2, batch_size=2, hidden_size=32, layers=1, mlp_size=64, vocabulary=400)
    return train_base(rows / "sft.jsonl", size, folder)


@pytest.mark.slow
def test_the_training_commands_end_in_adapters(rows: Path, tmp_path: Path) -> None:
    base = made_base(rows, tmp_path / "base")
    steps = ["--max-steps", 2, "--batch-size", 2, "--save-every", 1, "--device", "cpu"]
    sft = ["--rows", rows / "sft.jsonl", "--base", base, "--max-length", 500, "--eval-every", 2]
    call("sft", *sft, "--output", tmp_path / "sft", *steps)
    rm = ["--rows", rows / "reward.jsonl", "--base", base, "--max-length", 500, "--eval-every", 2]
    call("rm", *rm, "--output", tmp_path / "rm", *steps)
    settings = tmp_path / "grpo.yaml"
    settings.write_text("gate_min_spearman: null\nmax_steps: 5\nprompts_per_step: 1\nnum_generations: 2\n")
    grpo = ["--prompts", rows / "reward.jsonl", "--base", base, "--policy", tmp_path / "sft" / "adapter"]
    grpo += ["--reward-model", tmp_path / "rm" / "adapter", "--max-prompt-length", 500]
    call("grpo", *grpo, "--output", tmp_path / "grpo", "--config", settings, *steps, "--max-completion-length", 8)
    for stage in ("sft", "rm", "grpo"):
        assert (tmp_path / stage / "adapter" / "adapter_model.safetensors").is_file()
        assert (tmp_path / stage / "metrics.jsonl").read_text()
    saved = json.loads((tmp_path / "grpo" / "settings.json").read_text())["settings"]
    assert (saved["max_steps"], saved["num_generations"]) == (2, 2)  # the flag wins over the file


def test_evaluate_compares_systems_pair_by_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systems = ["--system", "generous=scripted/generous", "--system", "fair=scripted/fair"]
    panel = ["--partner", "scripted/fair", "--partner", "scripted/tough", "--judge", "scripted/judge"]
    call("evaluate", "--manifest", "sandbox-held-out", "--count", 24, *systems, *panel, "--output", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    goal = next(row for row in rows if row["metric"] == "goal")
    assert (goal["system_a"], goal["system_b"], goal["num_pairs"]) == ("fair", "generous", 48)
    assert goal["low"] < goal["difference"] < goal["high"]
    assert goal["difference"] > 0
    assert "Goal" in capsys.readouterr().out
    assert "<html" in (tmp_path / "report.html").read_text()


def test_wrong_flags_and_files_end_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agents = ["--agent1", "scripted/fair", "--agent2", "scripted/fare", *DATA, "--store", tmp_path / "e.db"]
    assert refused("simulate", "--manifest", "sandbox-train", *agents) == 2
    assert capsys.readouterr().err == "sotopia-rl: scripted/fare: no such model, did you mean scripted/fair?\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text("max_turn: 3\n")
    agents = ["--agent1", "scripted/fair", "--agent2", "scripted/fair", *DATA, "--store", tmp_path / "e.db"]
    assert refused("simulate", "--manifest", "sandbox-train", *agents, "--config", bad) == 2
    assert capsys.readouterr().err == f"sotopia-rl: {bad}: max_turn: unknown key, did you mean 'max_turns'?\n"


def test_what_cannot_be_done_ends_with_1_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "episodes.db"
    assert refused("judge", *DATA, "--judge", "scripted/judge", "--store", store) == 1
    assert capsys.readouterr().err.count("\n") == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    base = save_model(tmp_path / "base")
    assert refused("sft", "--rows", rows, "--base", base, "--output", tmp_path / "sft") == 1
    assert "no rows in it" in capsys.readouterr().err
    rows.write_text('{"prompt": [')
    assert refused("sft", "--rows", rows, "--base", base, "--output", tmp_path / "sft2") == 1
    assert f"{rows}:1: not JSON" in capsys.readouterr().err


def test_a_tag_that_has_no_episodes_is_named_with_those_that_exist(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = rows.parent / "episodes.db"
    assert refused("judge", "--tag", "dmeo", "--judge", "scripted/judge", "--store", store) == 1
    assert "tags in this store: demo (12)" in capsys.readouterr().err


def test_help_is_fast_and_does_not_load_torch() -> None:
    program = (
        "import sys, time; start = time.process_time()\n"
        "from sotopia_rl.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('SECONDS', time.process_time() - start, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    for _ in range(3):  # a busy machine is slow once, a slow command each time
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        _, seconds, *loaded = run.stdout.split("\n")[-2].split()
        assert loaded == ["False", "False"]
        assert "grpo" in run.stdout
        if float(seconds) < 0.8:
            break
    assert float(seconds) < 0.8
