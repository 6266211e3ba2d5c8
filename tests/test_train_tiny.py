from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sotopia_rl.train.config import TinyModelSettings
from sotopia_rl.train.data import completion_token_ids, completions_token_ids, prompt_token_ids
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.tiny import tiny_model, tiny_tokenizer, train_base
from training_rows import reward_rows
from training_settings import TINY

TEXTS = [f"user\n{row.prompt[0].content}\nassistant\n{row.completion[0].content}" for row in reward_rows(6)]
TOKENIZER = tiny_tokenizer(TEXTS, 600)


@given(st.text())
def test_any_text_comes_back_unchanged(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    specials = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    assert any(special in text for special in specials) or TOKENIZER.decode(ids) == text


def test_digits_are_tokens_of_their_own() -> None:
    assert TOKENIZER.tokenize("$1250")[-4:] == ["1", "2", "5", "0"]


def test_fixed_phrases_become_few_tokens() -> None:
    text = reward_rows(1)[3].prompt[0].content
    assert len(TOKENIZER(text)["input_ids"]) < len(text) / 6


def test_padding_is_not_the_end_of_a_reply() -> None:
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id


def test_prompt_and_reply_ids_are_what_the_chat_template_renders() -> None:
    row = reward_rows(1)[0]
    chat = [message.model_dump() for message in (*row.prompt, *row.completion)]
    rendered = TOKENIZER.apply_chat_template(chat, tokenize=True, return_dict=False)
    ids = prompt_token_ids(TOKENIZER, row.prompt) + completion_token_ids(TOKENIZER, row.completion[0].content)
    assert rendered[: len(ids)] == ids


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=12))
def test_replies_have_the_same_ids_together_as_alone(texts: list[str]) -> None:
    assert completions_token_ids(TOKENIZER, texts) == [completion_token_ids(TOKENIZER, text) for text in texts]


def test_the_template_marks_what_the_assistant_says() -> None:
    row = reward_rows(1)[0]
    chat = [message.model_dump() for message in (*row.prompt, *row.completion)]
    found = TOKENIZER.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert said == completion_token_ids(TOKENIZER, row.completion[0].content)


def test_the_quickstart_model_has_under_two_million_parameters() -> None:
    assert 200_000 < tiny_model(TOKENIZER, TinyModelSettings()).num_parameters() < 2_000_000


def test_the_result_is_an_ordinary_model_folder(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    fresh = tiny_tokenizer([TEXTS[0]], 300)
    assert tokenizer.chat_template == fresh.chat_template
    ids = tokenizer("What about $50?", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "What about $50?"
    assert model(ids).logits.shape == (*ids.shape, len(tokenizer))


def test_the_loss_falls_and_the_same_seed_gives_the_same_model(rows: Path, base: Path, tmp_path: Path) -> None:
    losses = [line["loss"] for line in read_metrics(base.parent / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    again = AutoModelForCausalLM.from_pretrained(train_base(rows, TINY, tmp_path / "again")).state_dict()
    first = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_finished_run_is_left_alone(rows: Path, base: Path, tmp_path: Path) -> None:
    before = (base / "model.safetensors").stat().st_mtime_ns
    assert train_base(rows, TINY, base.parent, resume=False) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_stopped_in_the_middle_ends_like_an_unbroken_one(rows: Path, base: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_base(rows, TINY, tmp_path, progress=stop)
    resumed = train_base(rows, TINY, tmp_path)
    assert (resumed / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
