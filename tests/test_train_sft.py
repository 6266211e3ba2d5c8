import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, load_peft_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sotopia_rl.dataset import SFTRow, read_rows
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.train.batches import IGNORED, language_rows
from sotopia_rl.train.data import encode_rows, reply_text
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.grpo import train_grpo
from sotopia_rl.train.loading import load_base, load_tokenizer
from sotopia_rl.train.reward_model import train_reward_model
from sotopia_rl.train.sft import train_sft
from training_settings import GRPO, RM, SFT


def comparable(path: Path) -> list[dict[str, object]]:
    """Metrics without what depends on the clock."""
    lines = read_metrics(path)
    return [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k} for line in lines]


def test_the_loss_covers_the_reply_and_its_end_token_and_nothing_else(rows: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    data = list(read_rows(SFTRow, rows))
    for row, columns in zip(
        data,
        language_rows(encode_rows(tokenizer, data, max_length=512, reply=reply_text)),
        strict=True,
    ):
        trained = [i for i, label in zip(columns["input_ids"], columns["labels"], strict=True) if label != IGNORED]
        assert tokenizer.decode(trained) == row.completion[0].content + "<|im_end|>"
        assert [label for label in columns["labels"] if label != IGNORED] == trained


def test_the_adapter_moved_and_the_base_did_not(base: Path, sft_adapter: Path) -> None:
    checkpoint = load_file(base / "model.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sft_adapter)
    assert list(model.peft_config) == ["default"]
    weights = load_peft_weights(str(sft_adapter))
    assert all(torch.any(tensor != 0) for name, tensor in weights.items() if "lora_B" in name)
    frozen = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters() if "lora_" not in n}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in checkpoint.items())
    modules = json.loads((sft_adapter / "adapter_config.json").read_text())["target_modules"]
    adapted = {module.rpartition(".")[2] for module in modules}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_result_is_the_adapter_with_the_lowest_held_out_loss(sft_adapter: Path) -> None:
    losses = {
        line["step"]: line["eval_loss"]
        for line in read_metrics(sft_adapter.parent / "metrics.jsonl")
        if "eval_loss" in line
    }
    finished = json.loads((sft_adapter.parent / "finished.json").read_text())
    assert list(losses) == [2, 4, 6]
    assert finished["best_step"] == min(losses, key=lambda step: losses[step])
    assert finished["held_out_rows"] > 0
    assert finished["data"]["rows"] == 96


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_ends_like_an_unbroken_one(
    rows: Path, base: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(rows, base, SFT, tmp_path, progress=stop)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]
    resumed = train_sft(rows, base, SFT, tmp_path)
    weights, unbroken = load_peft_weights(str(resumed)), load_peft_weights(str(sft_adapter))
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)
    assert comparable(tmp_path / "metrics.jsonl") == comparable(sft_adapter.parent / "metrics.jsonl")


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(
    rows: Path, base: Path, sft_adapter: Path
) -> None:
    assert train_sft(rows, base, SFT, sft_adapter.parent, resume=False) == sft_adapter
    changed = SFT.model_copy(update={"lora_r": 4})
    with pytest.raises(ConfigError, match=r"settings\.lora_r was 8, now 4"):
        train_sft(rows, base, changed, sft_adapter.parent)


def test_full_fine_tuning_writes_a_whole_model(rows: Path, base: Path, tmp_path: Path) -> None:
    settings = SFT.model_copy(update={"tuning": "full", "max_steps": 1, "held_out_share": 0.0})
    folder = train_sft(rows, base, settings, tmp_path)
    tuned, untuned = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert folder.name == "model"
    assert all(not torch.equal(tuned[name], untuned[name]) for name in untuned)
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(("missing", "words"), [("rows.jsonl", "no such file"), ("base", "no such file or folder")])
def test_missing_inputs_are_named(rows: Path, base: Path, tmp_path: Path, missing: str, words: str) -> None:
    chosen_rows = tmp_path / missing if missing == "rows.jsonl" else rows
    chosen_base = tmp_path / missing if missing == "base" else base
    with pytest.raises(DataError, match=words):
        train_sft(chosen_rows, chosen_base, SFT, tmp_path / "out")


def test_a_folder_that_is_no_model_is_named(rows: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a model folder \(it has no config\.json\)"):
        train_sft(rows, rows.parent, SFT, tmp_path)


@pytest.mark.slow
def test_a_base_in_four_bits_goes_through_every_stage(rows: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    four_bits = {"quantise": "nf4", "max_steps": 1}
    adapter = train_sft(rows, base, SFT.model_copy(update=four_bits), tmp_path / "sft")
    reward = train_reward_model(rows, base, RM.model_copy(update=four_bits), tmp_path / "rm")
    settings = GRPO.model_copy(update=four_bits)
    train_grpo(rows, base, adapter, reward, settings, tmp_path / "grpo")
    model = load_base(base, load_tokenizer(base), settings)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    whole = AutoModelForCausalLM.from_pretrained(base)
    assert model.get_memory_footprint() < 0.7 * whole.get_memory_footprint()


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_a_tokenizer_that_pads_with_its_end_token_is_mended(base: Path, tmp_path: Path, pad: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(base / "config.json", tmp_path)
    mended = load_tokenizer(tmp_path)
    assert mended.pad_token == "<|pad|>"
    assert mended.pad_token_id != mended.eos_token_id


@pytest.mark.slow
def test_a_full_disk_is_said_plainly_and_checkpoints_survive(rows: Path, base: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from training_settings import SFT\n"
        "from sotopia_rl.train.sft import train_sft; from sotopia_rl.errors import TrainingError\n"
        "rows, base, out = map(Path, sys.argv[1:4])\n"
        "def fill(done, total):\n"
        "    if done == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: train_sft(rows, base, SFT, out, progress=fill)\n"
        "except TrainingError as error: print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(rows), str(base), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert found.stdout.strip() == f"{tmp_path}: the disk is full; make room and resume"
    train_sft(rows, base, SFT, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")][-1] == 6
