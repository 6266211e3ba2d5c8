"""What cannot work, said in one line by the real commands, before the expensive part where it can be known."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from sotopia_rl.cli import main
from sotopia_rl.dataset import RewardRow, read_rows, write_rows
from sotopia_rl.errors import TrainingError
from sotopia_rl.train.config import SFTSettings, TrainerSettings
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.grpo import train_grpo
from sotopia_rl.train.reward_model import train_reward_model
from sotopia_rl.train.sft import train_sft
from training_settings import GRPO, RM, SFT

QUICK = ["--max-steps", "1", "--max-length", "512", "--batch-size", "4"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and the last line on stderr of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sotopia-rl: ")]
    assert len(lines) == 1
    assert isinstance(end.value.code, int)
    return end.value.code, lines[0]


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json}\n", "rows.jsonl:2: not JSON"),
        ('{"prompt": [], "completion": []}\n', "rows.jsonl:2: field"),
        ("[1, 2]\n", "rows.jsonl:2: expected a JSON object, found list"),
    ],
)
def test_a_row_that_does_not_parse_is_named_with_its_line(
    capsys: pytest.CaptureFixture[str], rows: Path, base: Path, tmp_path: Path, stage: str, text: str, words: str
) -> None:
    bad = tmp_path / "rows.jsonl"
    bad.write_text(rows.read_text().splitlines(keepends=True)[0] + text)
    code, line = refused(capsys, stage, "--rows", bad, "--base", base, "--output", tmp_path / "out", *QUICK)
    assert (code, words in line) == (1, True), line


def test_rows_that_are_all_too_long_are_counted_and_the_length_is_told(
    capsys: pytest.CaptureFixture[str], rows: Path, base: Path, tmp_path: Path
) -> None:
    length = ["--max-steps", "1", "--max-length", "40"]
    code, line = refused(capsys, "sft", "--rows", rows, "--base", base, "--output", tmp_path, *length)
    assert code == 1
    assert "rows do not fit into 40 tokens even without their history; the first is episode e" in line
    assert "raise the length limit" in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"value":', '"value":NaN,"was":', "rows.jsonl:1: field value"),
        (None, None, "rows.jsonl: all 96 rewards of value are 7; nothing can be learned"),
    ],
)
def test_rewards_that_teach_nothing_are_refused(
    capsys: pytest.CaptureFixture[str],
    rows: Path,
    base: Path,
    tmp_path: Path,
    old: str | None,
    new: str | None,
    words: str,
) -> None:
    bad = tmp_path / "rows.jsonl"
    if old is None or new is None:
        write_rows((row.model_copy(update={"value": 7.0}) for row in read_rows(RewardRow, rows)), bad)
    else:
        bad.write_text(rows.read_text().replace(old, new))
    code, line = refused(capsys, "rm", "--rows", bad, "--base", base, "--output", tmp_path / "out", *QUICK)
    assert (code, words in line) == (1, True), line


@pytest.fixture
def other_base(base: Path, tmp_path: Path) -> Path:
    other = tmp_path / "other-base"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    return other


@pytest.mark.parametrize("wrong", ["policy", "reward_model"])
def test_an_adapter_for_another_base_is_refused_naming_both(
    capsys: pytest.CaptureFixture[str],
    rows: Path,
    base: Path,
    other_base: Path,
    sft_adapter: Path,
    reward_adapter: Path,
    tmp_path: Path,
    wrong: str,
) -> None:
    adapters = {"policy": sft_adapter, "reward_model": reward_adapter}
    mine = tmp_path / "mine"
    shutil.copytree(adapters[wrong], mine)
    (mine / "base.json").write_text(json.dumps({"path": str(other_base), "fingerprint": "0" * 16}))
    adapters[wrong] = mine
    paths = ["--policy", adapters["policy"], "--reward-model", adapters["reward_model"], "--output", tmp_path / "out"]
    gate = ["--max-prompt-length", "512", "--gate-min-spearman", "-1"]
    code, line = refused(capsys, "grpo", "--prompts", rows, "--base", base, *paths, *gate)
    assert code == 1
    assert f"{mine}: the adapter was trained on the base {other_base}, not on {base}" in line


def test_a_folder_with_a_run_of_another_config_is_refused_naming_what_differs(
    capsys: pytest.CaptureFixture[str], rows: Path, base: Path, sft_adapter: Path
) -> None:
    place = ["--rows", rows, "--base", base, "--output", sft_adapter.parent]
    code, line = refused(capsys, "sft", *place, *QUICK, "--lora-r", "4")
    assert code == 2
    assert "holds a run with other settings" in line
    assert "settings.lora_r was 8, now 4" in line


def test_a_reward_model_below_the_gate_is_refused(
    capsys: pytest.CaptureFixture[str], rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    paths = ["--policy", sft_adapter, "--reward-model", reward_adapter, "--output", tmp_path]
    code, line = refused(capsys, "grpo", "--prompts", rows, "--base", base, *paths, "--gate-min-spearman", "1")
    assert code == 1
    assert "Spearman correlation" in line
    assert "is below 1.0; train a better one, or switch the gate off (gate_min_spearman: null)" in line


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_gpu_that_is_not_there_is_said_at_once(
    capsys: pytest.CaptureFixture[str], rows: Path, base: Path, tmp_path: Path, stage: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    place = ["--rows", rows, "--base", base, "--output", tmp_path]
    assert refused(capsys, stage, *place, "--device", "cuda") == (
        2,
        "sotopia-rl: device: cuda, but torch sees no GPU; use device: auto or cpu",
    )


def test_flash_attention_without_its_package_is_named(
    capsys: pytest.CaptureFixture[str], rows: Path, base: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    place = ["--rows", rows, "--base", base, "--output", tmp_path]
    code, line = refused(capsys, "sft", *place, *QUICK, "--attention", "flash_attention_2")
    assert (code, "pip install flash-attn" in line) == (2, True)


def allocate_too_much(done: int, total: int) -> None:
    """A step that needs more memory than there is: the allocator itself refuses."""
    if done == 3:
        torch.empty(2**55)


@pytest.mark.slow
def test_out_of_memory_says_which_settings_to_lower_and_the_run_goes_on_under_them(
    rows: Path, base: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TrainingError,
        match=r"the machine is out of memory; set gradient_checkpointing: true or lower "
        r"batch_size \(8\) and raise accumulation as much, and resume; or in a new folder lower "
        r"max_length, set quantise: nf4",
    ):
        train_sft(rows, base, SFT, tmp_path, progress=allocate_too_much)
    smaller = SFT.model_copy(update={"batch_size": 4, "accumulation": 2, "gradient_checkpointing": True})
    train_sft(rows, base, smaller, tmp_path)
    losses, expected = (
        [line["eval_loss"] for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line]
        for folder in (tmp_path, sft_adapter.parent)
    )
    assert losses == pytest.approx(expected, rel=0.02)  # dropout falls differently on smaller batches


@pytest.mark.slow
def test_out_of_memory_in_grpo_names_its_own_settings(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    short = GRPO.model_copy(update={"max_steps": 3})
    with pytest.raises(
        TrainingError,
        match=r"lower batch_size \(8\), and resume; or in a new folder lower "
        r"max_prompt_length, lower max_completion_length, set quantise: nf4",
    ):
        train_grpo(rows, base, sft_adapter, reward_adapter, short, tmp_path, progress=allocate_too_much)
    smaller = short.model_copy(update={"batch_size": 4})
    assert train_grpo(rows, base, sft_adapter, reward_adapter, smaller, tmp_path).is_dir()


def test_the_memory_of_a_gpu_is_called_that(rows: Path, base: Path, tmp_path: Path) -> None:
    def fill(done: int, total: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(TrainingError, match="the GPU is out of memory; set gradient_checkpointing: true or lower"):
        train_sft(rows, base, SFT.model_copy(update={"max_steps": 1}), tmp_path, progress=fill)


def test_other_errors_of_torch_stay_what_they_are(rows: Path, base: Path, tmp_path: Path) -> None:
    def break_down(done: int, total: int) -> None:
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train_sft(rows, base, SFT, tmp_path, progress=break_down)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_run_that_diverges_stops_and_keeps_its_last_sound_checkpoint(
    rows: Path, base: Path, tmp_path: Path, stage: str
) -> None:
    wild: dict[str, object] = {"learning_rate": 1e30, "schedule": "constant", "warmup_share": 0.0, "save_every": 1}
    train = partial(train_sft, settings=SFT) if stage == "sft" else partial(train_reward_model, settings=RM)
    chosen = train.keywords["settings"].model_copy(update=wild)
    with pytest.raises(TrainingError, match=r"step \d: (loss|grad_norm|eval_loss) is (nan|inf); lower learning_rate"):
        train(rows, base, settings=chosen, out=tmp_path)
    assert all((folder / "COMPLETE").is_file() for folder in (tmp_path / "checkpoints").iterdir())


def test_rewards_that_are_all_equal_stop_grpo(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    settings = GRPO.model_copy(
        update={
            "on_collapse": "stop",
            "validity_gate": True,
            "min_validity": 0.0,
            "min_entropy": 0.0,
            "max_steps": 9,
            "eval_every": 50,
        }
    )
    with pytest.raises(TrainingError, match="all replies to a prompt had the same reward for 5 steps"):
        train_grpo(rows, base, sft_adapter, reward_adapter, settings, tmp_path)


def test_every_stage_has_the_settings_that_the_advice_names() -> None:
    assert {"batch_size", "dtype", "learning_rate"} <= set(TrainerSettings.model_fields)
    assert {"accumulation", "gradient_checkpointing", "quantise"} <= set(SFTSettings.model_fields)
