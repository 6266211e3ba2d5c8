import json
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
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.sft import train_sft
from training_settings import SFT


def comparable(path: Path) -> list[dict[str, object]]:
    """Metrics without what depends on the clock or restarts at a resume (TRL's token count)."""
    lines = read_metrics(path)
    return [
        {k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k and "num_tokens" not in k}
        for line in lines
    ]


def test_the_loss_covers_the_reply_and_its_end_token_and_nothing_else(rows: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    data = list(read_rows(SFTRow, rows))
    for row, columns in zip(
        data,
        language_rows(encode_rows(tokenizer, data, max_length=512, reply=reply_text), loss_on="reply"),
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


def test_rows_that_cannot_fit_stop_the_run_before_it_starts(rows: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows do not fit into 40 tokens .* episode e\d+, turn \d"):
        train_sft(rows, base, SFT.model_copy(update={"max_length": 40}), tmp_path)


@pytest.mark.parametrize(("missing", "words"), [("rows.jsonl", "no such file"), ("base", "no such file or folder")])
def test_missing_inputs_are_named(rows: Path, base: Path, tmp_path: Path, missing: str, words: str) -> None:
    chosen_rows = tmp_path / missing if missing == "rows.jsonl" else rows
    chosen_base = tmp_path / missing if missing == "base" else base
    with pytest.raises(DataError, match=words):
        train_sft(chosen_rows, chosen_base, SFT, tmp_path / "out")


def test_a_folder_that_is_no_model_is_named(rows: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer|no model folder"):
        train_sft(rows, rows.parent, SFT, tmp_path)


def test_a_gpu_that_is_not_there_is_an_error(rows: Path, base: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        train_sft(rows, base, SFT.model_copy(update={"device": "cuda"}), tmp_path)
