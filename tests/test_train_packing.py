"""Packing and joining rows without padding: the same loss, no row sees another, and a resumed run ends the same."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import load_peft_weights

from sotopia_rl.dataset import SFTRow, read_rows
from sotopia_rl.train.batches import IGNORED
from sotopia_rl.train.config import SFTSettings
from sotopia_rl.train.data import Encoded, encode_rows, reply_text
from sotopia_rl.train.folder import RunFolder, read_metrics
from sotopia_rl.train.loading import load_base, load_tokenizer
from sotopia_rl.train.sft import make_trainer, train_sft, training_rows
from training_rows import rows_file
from training_settings import SFT

WHOLE = SFT.model_copy(update={"held_out_share": 0.0, "lora_dropout": 0.0, "max_steps": 1})


def encoded(prompt: list[int], reply: list[int], talk: tuple[str, int] = ("e", 0)) -> Encoded:
    return Encoded(messages=(), prompt_ids=prompt, completion_ids=reply, dropped_turns=0, talk=talk)


lengths = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=40)


@settings(max_examples=25)
@given(lengths=lengths)
def test_packing_keeps_every_row_whole_and_within_the_limit(lengths: list[tuple[int, int]]) -> None:
    rows = [encoded([3 * i] * p, [3 * i + 1] * r) for i, (p, r) in enumerate(lengths)]
    packed = training_rows(rows, SFTSettings(packing="packed", max_length=32))
    found = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 32
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            found.append((row["input_ids"][part], row["labels"][part]))
            start += length
    assert sorted(ids for ids, _ in found) == sorted(row.ids for row in rows)
    assert all(
        [label for label in labels if label != IGNORED] == ids[-sum(x != IGNORED for x in labels) :]
        for ids, labels in found
    )


def first_loss(rows: Path, base: Path, out: Path, **update: object) -> float:
    train_sft(rows, base, WHOLE.model_copy(update=update), out)
    return float(read_metrics(out / "metrics.jsonl")[0]["loss"])


def test_packed_and_joined_rows_have_the_loss_of_padded_ones(base: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path, episodes=2)
    padded = first_loss(rows, base, tmp_path / "none")
    packed = first_loss(rows, base, tmp_path / "packed", packing="packed")
    joined = first_loss(rows, base, tmp_path / "free", packing="padding_free")
    assert packed == pytest.approx(padded, rel=1e-5)
    assert joined == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize("packing", ["packed", "padding_free"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_sees_nothing_of_the_one_before_it(
    rows: Path, base: Path, tmp_path: Path, packing: str, attention: str
) -> None:
    chosen = WHOLE.model_copy(update={"packing": packing, "attention": attention, "max_length": 1024})
    tokenizer = load_tokenizer(base)
    two = encode_rows(tokenizer, list(read_rows(SFTRow, rows))[:2], max_length=512, reply=reply_text)
    model = load_base(base, tokenizer, chosen)
    trainer = make_trainer(model, tokenizer, chosen, RunFolder(tmp_path), train_rows=two, eval_rows=[])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    assert "attention_mask" not in batch  # with one, rows would attend to each other
    labels = batch.pop("labels")
    second = int((batch["position_ids"][0] == 0).nonzero()[1])
    model = trainer.model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        batch["input_ids"][0, : second - 1] = 7
        after = model(**batch).logits
    assert torch.equal(before[0, second:], after[0, second:])
    assert not torch.equal(before[0, :second], after[0, :second])
    assert (labels != IGNORED).sum() == sum(len(row.completion_ids) for row in two)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["packed", "conversation"])
def test_a_packed_run_stopped_in_the_middle_ends_like_an_unbroken_one(
    rows: Path, base: Path, tmp_path: Path, packing: str
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    chosen = SFT.model_copy(update={"packing": packing, "batch_size": 2, "max_steps": 4})
    unbroken = train_sft(rows, base, chosen, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train_sft(rows, base, chosen, tmp_path / "stopped", progress=stop)
    resumed = train_sft(rows, base, chosen, tmp_path / "stopped")
    weights, expected = load_peft_weights(str(resumed)), load_peft_weights(str(unbroken))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_epochs_decide_the_number_of_steps(rows: Path, base: Path, tmp_path: Path) -> None:
    train_sft(rows, base, WHOLE.model_copy(update={"num_epochs": 0.5, "batch_size": 16, "max_steps": 99}), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
