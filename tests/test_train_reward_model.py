import json
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights
from safetensors.torch import load_file
from transformers import MistralConfig, MistralModel

from sotopia_rl.dataset import RewardRow, read_rows
from sotopia_rl.errors import DataError, TrainingError
from sotopia_rl.train.adapters import REWARD, RewardScorer, check_base, load_policy, only_adapter
from sotopia_rl.train.config import RewardModelSettings
from sotopia_rl.train.data import encode_rows, reply_text
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.prompt_once import Pair, last_states
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
    scorer = RewardScorer(model, reward_adapter, batch_size=4)
    shared = scorer.score([(row.prompt_ids, row.completion_ids) for row in encoded])
    assert torch.allclose(torch.tensor(alone), shared, atol=1e-5)
    one_by_one = torch.cat([scorer.score([(row.prompt_ids, row.completion_ids)]) for row in encoded])
    assert torch.allclose(one_by_one, shared, atol=1e-5)


def test_whether_a_reply_ended_counts(base: Path, sft_adapter: Path, reward_adapter: Path, rows: Path) -> None:
    tokenizer = load_tokenizer(base)
    (row,) = encode_rows(tokenizer, list(read_rows(RewardRow, rows))[:1], max_length=512, reply=reply_text)
    scorer = RewardScorer(load_policy(base, sft_adapter, tokenizer, GRPO), reward_adapter, batch_size=4)
    ended, cut_off = scorer.score([(row.prompt_ids, row.completion_ids), (row.prompt_ids, row.completion_ids[:-1])])
    assert not torch.allclose(ended, cut_off, atol=1e-6)


def test_replies_to_one_prompt_score_as_each_alone_whatever_shares_their_batch(
    base: Path, sft_adapter: Path, reward_adapter: Path
) -> None:
    model = load_policy(base, sft_adapter, load_tokenizer(base), GRPO)
    prompts = [list(range(5, 25)), list(range(40, 47)), [9, 8, 9]]
    pairs: list[Pair] = [(p, list(range(60, 60 + n))) for n in (1, 6, 3, 4) for p in prompts]
    pairs += [pairs[4], (prompts[0], [])]
    together = RewardScorer(model, reward_adapter, batch_size=5)
    found = together.score(pairs)
    alone = torch.cat([together.score([pair]) for pair in pairs])
    assert torch.allclose(found, alone, atol=1e-5)
    assert torch.allclose(found[4], found[-2], atol=1e-5)
    assert len({round(score, 5) for score in found[:, 0].tolist()}) == len(pairs) - 1  # no reply takes another's score


def test_a_decoder_with_a_sliding_window_is_read_whole() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    decoder = MistralModel(
        MistralConfig(**shape, num_key_value_heads=2, vocab_size=99, sliding_window=4, pad_token_id=0)
    ).eval()
    pairs = [(list(range(1, 1 + n)), list(range(50, 50 + n))) for n in (2, 7, 5)]
    with torch.no_grad():
        found = last_states(
            lambda **inputs: decoder(**inputs).last_hidden_state, pairs, config=decoder.config, device=decoder.device
        )
        for (prompt, reply), state in zip(pairs, found, strict=True):
            alone = decoder(torch.tensor([[*prompt, *reply]])).last_hidden_state[0, -1]
            assert torch.allclose(state, alone, atol=1e-5)


def test_as_many_passes_are_made_whichever_pairs_are_equal(base: Path, sft_adapter: Path, reward_adapter: Path) -> None:
    # with FSDP or ZeRO-3 every process must make the same number of passes, or all wait for ever
    model = load_policy(base, sft_adapter, load_tokenizer(base), GRPO)
    scorer = RewardScorer(model, reward_adapter, batch_size=4)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    passes = []
    for pairs in ([([5], [6])] * 10, [([5, n], [6, n]) for n in range(10)]):
        calls.clear()
        scorer.score(pairs)
        passes.append(len(calls))
    assert passes[0] == passes[1] > 0


def test_scoring_leaves_the_policy_as_it_was(base: Path, sft_adapter: Path, reward_adapter: Path) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scorer = RewardScorer(model, reward_adapter, batch_size=4)
    model.train()
    scorer.score([([5, 6], [7])])
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(".default." in name for name in trainable)
    assert model.active_adapter == "default"
    assert model.training


def test_an_exception_while_scoring_leaves_the_policy_as_it_was(
    base: Path, sft_adapter: Path, reward_adapter: Path
) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    RewardScorer(model, reward_adapter, batch_size=4)
    with pytest.raises(ZeroDivisionError), only_adapter(model, REWARD):
        _ = 1 / 0
    assert model.active_adapter == "default"


def test_several_dimensions_are_several_outputs(rows: Path, base: Path, tmp_path: Path) -> None:
    settings = RM.model_copy(update={"dimensions": ("goal", "relationship"), "max_steps": 1})
    adapter = train_reward_model(rows, base, settings, tmp_path)
    report = RewardReport.model_validate_json((adapter / "report.json").read_text())
    assert [output.name for output in report.outputs] == ["goal", "relationship"]
    assert load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"].shape[0] == 2


@pytest.mark.slow
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
        check_base(sft_adapter, other, task="CAUSAL_LM")
    with pytest.raises(DataError, match="no adapter"):
        check_base(base, base, task="CAUSAL_LM")


def test_an_adapter_for_another_task_is_refused(base: Path, sft_adapter: Path, reward_adapter: Path) -> None:
    with pytest.raises(DataError, match="not a policy; it was made for SEQ_CLS"):
        check_base(reward_adapter, base, task="CAUSAL_LM")
    with pytest.raises(DataError, match="not a reward model; it was made for CAUSAL_LM"):
        check_base(sft_adapter, base, task="SEQ_CLS")


def test_an_adapter_without_a_head_is_no_reward_model(base: Path, sft_adapter: Path) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, SFT)
    with pytest.raises(DataError, match="no score head"):
        RewardScorer(model, sft_adapter, batch_size=4)
