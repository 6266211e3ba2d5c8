import json
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights
from safetensors.torch import load_file

from sotopia_rl.dataset import RewardRow, read_rows
from sotopia_rl.errors import DataError, TrainingError
from sotopia_rl.train.adapters import REWARD, RewardScorer, check_base, load_policy, only_adapter
from sotopia_rl.train.config import RewardModelSettings
from sotopia_rl.train.data import encode_rows, reply_text
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.reward_model import load_reward_model, predict, train_reward_model
from sotopia_rl.train.reward_report import RewardReport
from training_settings import GRPO, RM, SFT


def test_the_report_is_complete_and_stands_beside_the_adapter(reward_adapter: Path) -> None:
    report = RewardReport.model_validate_json((reward_adapter.parent / "report.json").read_text())
    assert (reward_adapter / "report.json").read_text() == (reward_adapter.parent / "report.json").read_text()
    (output,) = report.outputs
    assert output.name == "value"
    assert output.rows == sum(bin_.rows for bin_ in output.calibration) == report.held_out_episodes * 4
    losses = [
        line["eval_loss"] for line in read_metrics(reward_adapter.parent / "metrics.jsonl") if "eval_loss" in line
    ]
    assert output.mse == pytest.approx(min(losses), rel=1e-4)  # the report is of the weights that were kept


def test_head_and_adapter_moved(reward_adapter: Path) -> None:
    weights = load_peft_weights(str(reward_adapter))
    assert torch.any(weights["base_model.model.score.weight"] != 0)
    assert all(torch.any(tensor != 0) for name, tensor in weights.items() if "lora_B" in name)


def test_scores_on_the_shared_base_equal_those_of_the_model_alone(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path
) -> None:
    tokenizer = load_tokenizer(base)
    encoded = encode_rows(tokenizer, list(read_rows(RewardRow, rows))[:13], max_length=512, reply=reply_text)
    alone = predict(
        load_reward_model(base, reward_adapter, tokenizer, RM), encoded, tokenizer.pad_token_id, batch_size=5
    )
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    scorer = RewardScorer(model, reward_adapter, tokenizer.pad_token_id, batch_size=4)
    shared = scorer.score([row.ids for row in encoded])
    assert torch.allclose(torch.tensor(alone), shared, atol=1e-5)
    one_by_one = torch.cat([scorer.score([row.ids]) for row in encoded])
    assert torch.allclose(one_by_one, shared, atol=1e-5)


def test_whether_a_reply_ended_counts(base: Path, sft_adapter: Path, reward_adapter: Path, rows: Path) -> None:
    tokenizer = load_tokenizer(base)
    (row,) = encode_rows(tokenizer, list(read_rows(RewardRow, rows))[:1], max_length=512, reply=reply_text)
    scorer = RewardScorer(
        load_policy(base, sft_adapter, tokenizer, GRPO), reward_adapter, tokenizer.pad_token_id, batch_size=4
    )
    ended, cut_off = scorer.score([row.ids, row.ids[:-1]])
    assert not torch.allclose(ended, cut_off, atol=1e-6)


def test_scoring_leaves_the_policy_as_it_was(base: Path, sft_adapter: Path, reward_adapter: Path) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scorer = RewardScorer(model, reward_adapter, tokenizer.pad_token_id, batch_size=4)
    model.train()
    scorer.score([[5, 6, 7]])
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(".default." in name for name in trainable)
    assert model.active_adapter == "default"
    assert model.training


def test_an_exception_while_scoring_leaves_the_policy_as_it_was(
    base: Path, sft_adapter: Path, reward_adapter: Path
) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    RewardScorer(model, reward_adapter, tokenizer.pad_token_id, batch_size=4)
    with pytest.raises(ZeroDivisionError), only_adapter(model, REWARD):
        _ = 1 / 0
    assert model.active_adapter == "default"


def test_several_dimensions_are_several_outputs(rows: Path, base: Path, tmp_path: Path) -> None:
    settings = RM.model_copy(update={"dimensions": ("goal", "relationship"), "max_steps": 1})
    adapter = train_reward_model(rows, base, settings, tmp_path)
    report = RewardReport.model_validate_json((adapter / "report.json").read_text())
    assert [output.name for output in report.outputs] == ["goal", "relationship"]
    assert load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"].shape[0] == 2


def test_a_run_stopped_in_the_middle_ends_like_an_unbroken_one(
    rows: Path, base: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_reward_model(rows, base, RM, tmp_path, progress=stop)
    resumed = train_reward_model(rows, base, RM, tmp_path)
    weights, unbroken = load_peft_weights(str(resumed)), load_peft_weights(str(reward_adapter))
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)
    assert (resumed / "report.json").read_text() == (reward_adapter / "report.json").read_text()


def test_early_stopping_ends_the_run(rows: Path, base: Path, tmp_path: Path) -> None:
    settings = RM.model_copy(update={"learning_rate": 1.0, "max_steps": 40, "patience": 1, "eval_every": 1})
    train_reward_model(rows, base, settings, tmp_path)
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert finished["best_step"] < finished["steps"] < 40


def test_a_missing_dimension_is_named_with_its_line(rows: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no reward for secret \(it has goal, relationship\)"):
        train_reward_model(rows, base, RewardModelSettings(dimensions=("goal", "secret")), tmp_path)


def test_an_adapter_of_another_base_is_refused_naming_both(base: Path, sft_adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match=f"trained on the base {base}, not on {other}"):
        check_base(sft_adapter, other)
    with pytest.raises(DataError, match="no adapter"):
        check_base(base, base)


def test_an_adapter_without_a_head_is_no_reward_model(base: Path, sft_adapter: Path) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, SFT)
    with pytest.raises(DataError, match="no score head"):
        RewardScorer(model, sft_adapter, tokenizer.pad_token_id, batch_size=4)
