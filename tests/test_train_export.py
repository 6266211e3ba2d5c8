"""A trained reward model as others load it: by its keys, and on a real vLLM pooling server with its head."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from real_vllm import needs_smollm2, needs_vllm, on_cpu
from sotopia_rl.dataset import RewardRow, read_rows
from sotopia_rl.llm import smollm2
from sotopia_rl.serve.best_of_n import BestOfNSettings
from sotopia_rl.serve.run import open_reward_model
from sotopia_rl.serve.vllm import VLLMServer
from sotopia_rl.train.data import encode_rows, reply_text
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.reward_model import load_reward_model, predict, train_reward_model
from training_rows import rows_file
from training_settings import RM


def test_the_adapter_has_the_keys_that_peft_and_vllm_look_for(base: Path, reward_adapter: Path) -> None:
    config = json.loads((reward_adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["peft_type"], config["bias"]) == ("SEQ_CLS", "LORA", "none")
    assert "score" in config["modules_to_save"]
    assert config["base_model_name_or_path"] == str(base)
    weights = load_file(reward_adapter / "adapter_model.safetensors")
    hidden = AutoModelForCausalLM.from_pretrained(base).config.hidden_size
    assert weights.pop("base_model.model.score.weight").shape == (1, hidden)
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in weights} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert all(name.startswith("base_model.model.model.layers.") for name in weights)  # of the classifier's decoder


@pytest.mark.slow
@needs_vllm
@needs_smollm2
def test_a_vllm_pooling_server_scores_as_the_model_does_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = smollm2.cached()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    rows = rows_file(tmp_path / "rows", episodes=3)
    short = {
        "dimensions": ("goal", "relationship"),
        "max_steps": 1,
        "batch_size": 2,
        "eval_every": 1,
        "save_every": 1,
        "held_out_share": 0.3,
    }
    adapter = train_reward_model(rows, base, RM.model_copy(update=short), tmp_path / "rm")
    tokenizer = load_tokenizer(base)
    encoded = encode_rows(tokenizer, list(read_rows(RewardRow, rows))[:6], max_length=512, reply=reply_text)
    model = load_reward_model(base, adapter, tokenizer, RM.model_copy(update=short))
    here = torch.tensor(predict(model, encoded, tokenizer.pad_token_id, batch_size=3))
    del model
    pairs = [(tuple(row.prompt_ids), tuple(row.completion_ids)) for row in encoded]
    loaded = open_reward_model(str(adapter), BestOfNSettings())
    assert (here - torch.tensor(loaded.score(pairs))).abs().max() < 1e-4
    assert loaded.outputs == ("goal", "relationship")
    del loaded
    with VLLMServer(base, {"rm": adapter}, on_cpu(task="reward"), log=tmp_path / "vllm.log") as server:
        served = open_reward_model(server.model("rm"), BestOfNSettings(), base=base)
        there = torch.tensor(served.score(pairs))
    assert served.outputs == ("output_0", "output_1")  # a server does not say their names
    assert here.abs().max() > 1e-3  # the head has moved from zero
    assert (here - there).abs().max() < 1e-4
