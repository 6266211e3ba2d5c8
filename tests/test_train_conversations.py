"""Rows of one conversation read together: each sees itself alone; losses, gradients and scores are the padded ones."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MistralConfig

from sotopia_rl.dataset import RewardRow, SFTRow, read_rows
from sotopia_rl.errors import ConfigError
from sotopia_rl.train.batches import IGNORED
from sotopia_rl.train.config import RewardModelSettings, SFTSettings
from sotopia_rl.train.conversations import conversation_padding, conversations, visible
from sotopia_rl.train.data import Encoded, encode_rows, reply_text
from sotopia_rl.train.folder import RunFolder, read_metrics
from sotopia_rl.train.loading import load_base, load_tokenizer
from sotopia_rl.train.reward_model import train_reward_model
from sotopia_rl.train.sft import make_trainer, train_sft
from training_rows import rows_file
from training_settings import RM, SFT

ONE_STEP = {"held_out_share": 0.0, "lora_dropout": 0.0, "max_steps": 1}


@st.composite
def some_rows(draw: st.DrawFn) -> list[Encoded]:
    """Rows of two conversations over an alphabet so small that they often begin alike."""
    token = st.integers(0, 2)
    count = draw(st.integers(1, 12))
    return [
        Encoded(
            messages=(),
            prompt_ids=draw(st.lists(token, min_size=1, max_size=12)),
            completion_ids=draw(st.lists(token, min_size=1, max_size=6)),
            dropped_turns=0,
            talk=("e", draw(st.integers(0, 1))),
        )
        for _ in range(count)
    ]


@settings(max_examples=60)
@given(rows=some_rows(), max_length=st.integers(18, 40))
def test_every_row_is_there_whole_and_foretold_from_its_own_tokens(rows: list[Encoded], max_length: int) -> None:
    targets = [[float(number)] for number in range(len(rows))]
    found = {}
    for pack in conversations(rows, max_length, targets):
        assert len(pack["input_ids"]) <= 2 * max_length
        seen = visible(pack)
        for end, (target,) in zip([*pack["starts"][1:], len(pack["input_ids"])], pack["targets"], strict=True):
            path = seen[end - 1].nonzero()[:, 0].tolist()
            row = rows[int(target)]
            assert [pack["input_ids"][place] for place in path] == row.ids
            assert [pack["position_ids"][place] for place in path] == list(range(len(path)))
            for step, place in enumerate(path):
                assert seen[place].nonzero()[:, 0].tolist() == path[: step + 1]
            reply = path[len(row.prompt_ids) :]
            assert [pack["labels"][place] for place in reply] == row.completion_ids
            assert path[-len(reply) - 1 :] == list(
                range(end - len(reply) - 1, end)
            )  # the shift by one stays in the row
            found[int(target)] = len(reply)
        assert sum(label != IGNORED for label in pack["labels"]) == sum(
            len(rows[int(target)].completion_ids) for (target,) in pack["targets"]
        )
    assert len(found) == len(rows)


def first_line(path: Path) -> dict[str, float]:
    return next(line for line in read_metrics(path / "metrics.jsonl") if "loss" in line)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cloning_has_the_loss_and_the_gradient_of_padded_rows(base: Path, tmp_path: Path, attention: str) -> None:
    rows = rows_file(tmp_path, episodes=2)
    plain = SFT.model_copy(update={**ONE_STEP, "attention": attention})
    together = plain.model_copy(update={"packing": "conversation", "batch_size": 4})
    train_sft(rows, base, plain, tmp_path / "padded")
    train_sft(rows, base, together, tmp_path / "together")
    expected, got = first_line(tmp_path / "padded"), first_line(tmp_path / "together")
    for name in ("loss", "grad_norm", "token_accuracy", "num_tokens"):
        assert got[name] == pytest.approx(expected[name], rel=1e-4), name
    assert expected["num_tokens"] > 1000


@pytest.mark.parametrize("loss", ["mse", "mse_ranking"])
def test_a_reward_model_has_the_loss_and_the_gradient_of_padded_rows(base: Path, tmp_path: Path, loss: str) -> None:
    rows = rows_file(tmp_path, episodes=2)
    plain = RM.model_copy(update={**ONE_STEP, "loss": loss, "dimensions": ("goal", "relationship")})
    together = plain.model_copy(update={"packing": "conversation", "batch_size": 4})
    train_reward_model(rows, base, plain, tmp_path / "padded")
    train_reward_model(rows, base, together, tmp_path / "together")
    expected, got = first_line(tmp_path / "padded"), first_line(tmp_path / "together")
    for name in ("loss", "grad_norm"):
        assert got[name] == pytest.approx(expected[name], rel=1e-4), name


def test_a_row_sees_nothing_of_another(rows: Path, base: Path, tmp_path: Path) -> None:
    chosen = SFTSettings.model_validate({**SFT.model_dump(), **ONE_STEP, "packing": "conversation", "batch_size": 1})
    tokenizer = load_tokenizer(base)
    read = [row for row in read_rows(SFTRow, rows) if (row.episode_id, row.seat) == ("e0", 0)]
    two = encode_rows(tokenizer, read, max_length=512, reply=reply_text)
    trainer = make_trainer(
        load_base(base, tokenizer, chosen), tokenizer, chosen, RunFolder(tmp_path), train_rows=two, eval_rows=[]
    )
    (pack,) = trainer.train_dataset
    batch = trainer.data_collator([pack])
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    model, second, shared = trainer.model.eval(), pack["starts"][1], pack["shared"][1]
    assert 0 < shared < second
    with torch.no_grad():
        before = model(**given).logits
        given["input_ids"][0, shared:second] = 7
        after = model(**given).logits
    assert torch.equal(before[0, second:], after[0, second:])
    assert not torch.equal(before[0, shared:second], after[0, shared:second])


def test_a_reward_model_learns_from_conversations_and_reports_on_rows(base: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path)
    chosen = RewardModelSettings.model_validate({**RM.model_dump(), "packing": "conversation", "batch_size": 4})
    adapter = train_reward_model(rows, base, chosen, tmp_path / "rm")
    lines = read_metrics(tmp_path / "rm" / "metrics.jsonl")
    assert sum("eval_loss" in line for line in lines) == 3
    held_out = len(list(read_rows(RewardRow, rows))) * 0.3
    assert f'"rows": {round(held_out / 4) * 4}' in (adapter / "report.json").read_text()


def test_models_that_take_no_such_mask_are_refused() -> None:
    sliding = AutoModelForCausalLM.from_config(
        MistralConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=4,
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match="full attention"):
        conversation_padding(sliding.config, 0)
