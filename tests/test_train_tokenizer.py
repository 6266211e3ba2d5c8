"""Padding tokens and chat templates: what is mended or replaced is saved with the adapter and comes back exactly."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, load_peft_weights
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sotopia_rl.dataset import RewardRow, read_rows
from sotopia_rl.errors import ConfigError, TrainingError
from sotopia_rl.llm.open import open_model
from sotopia_rl.models import Message, Sampling
from sotopia_rl.train.adapters import RewardScorer, load_policy
from sotopia_rl.train.data import encode_rows, reply_text
from sotopia_rl.train.grpo import train_grpo
from sotopia_rl.train.loading import load_base, load_tokenizer
from sotopia_rl.train.reward_model import load_reward_model, predict, train_reward_model
from sotopia_rl.train.sft import train_sft
from training_settings import GRPO, RM, SFT

ONE_STEP = {"max_steps": 1, "held_out_share": 0.0}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>As the {{ message.role }}, I say: "
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def crowded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that pads with its end token, whose every token is taken and whose embeddings have no row to spare."""
    folder = tmp_path_factory.mktemp("crowded") / "base"
    state = json.loads(AutoTokenizer.from_pretrained(base).backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<|pad|>"]
    state["model"]["vocab"]["<|word|>"] = state["model"]["vocab"].pop("<|pad|>")  # its number goes to an ordinary word
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=AutoTokenizer.from_pretrained(base).chat_template,
    ).save_pretrained(folder)
    config = LlamaConfig.from_pretrained(base)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_real_padding_token_is_added_where_none_is_free(crowded: Path) -> None:
    tokenizer = load_tokenizer(crowded)
    before = AutoModelForCausalLM.from_pretrained(crowded)
    model = load_base(crowded, tokenizer, SFT)
    assert tokenizer.pad_token_id == before.config.vocab_size == len(tokenizer) - 1
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits, old = model(ids).logits, before(ids).logits
    assert torch.equal(logits[..., :-1], old)
    assert logits.softmax(-1)[..., -1].max() < 1 / len(tokenizer)  # it is never likely
    again = load_base(crowded, tokenizer, SFT)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_with_a_padding_token_of_its_own_every_stage_agrees(rows: Path, crowded: Path, tmp_path: Path) -> None:
    sft = train_sft(rows, crowded, SFT.model_copy(update=ONE_STEP), tmp_path / "sft")
    reward = train_reward_model(rows, crowded, RM.model_copy(update=ONE_STEP), tmp_path / "rm")
    for adapter in (sft, reward):
        assert AutoTokenizer.from_pretrained(adapter).pad_token == "<|pad|>"
        assert not any("embed" in name for name in load_peft_weights(str(adapter)))
    tokenizer = load_tokenizer(crowded)
    encoded = encode_rows(tokenizer, list(read_rows(RewardRow, rows))[:5], max_length=512, reply=reply_text)
    alone = predict(load_reward_model(crowded, reward, tokenizer, RM), encoded, tokenizer.pad_token_id, batch_size=5)
    policy = load_policy(crowded, sft, tokenizer, GRPO)
    scorer = RewardScorer(policy, reward, batch_size=2)
    shared = scorer.score([(row.prompt_ids, row.completion_ids) for row in encoded])
    assert torch.allclose(torch.tensor(alone), shared, atol=1e-5)
    ended, cut_off = scorer.score(
        [(encoded[0].prompt_ids, encoded[0].completion_ids), (encoded[0].prompt_ids, encoded[0].completion_ids[:-1])]
    )
    assert not torch.allclose(ended, cut_off, atol=1e-7)
    train_grpo(rows, crowded, sft, reward, GRPO.model_copy(update={"max_steps": 1}), tmp_path / "grpo")


def test_the_adapter_fits_the_base_that_was_never_lengthened(rows: Path, crowded: Path, tmp_path: Path) -> None:
    sft = train_sft(rows, crowded, SFT.model_copy(update=ONE_STEP), tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(crowded), sft).eval()
    mended = load_policy(crowded, sft, load_tokenizer(crowded), SFT).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, mended(ids).logits[..., :-1])


def test_a_chat_template_from_a_file_is_used_saved_and_taken_over(rows: Path, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    mine = {**ONE_STEP, "template_path": file}
    sft = train_sft(rows, base, SFT.model_copy(update=mine), tmp_path / "sft")
    reward = train_reward_model(rows, base, RM.model_copy(update=mine), tmp_path / "rm")
    assert AutoTokenizer.from_pretrained(sft).chat_template == TEMPLATE
    train_grpo(rows, base, sft, reward, GRPO.model_copy(update={"max_steps": 1}), tmp_path / "grpo")
    assert AutoTokenizer.from_pretrained(tmp_path / "grpo/adapter").chat_template == TEMPLATE

    async def prompt_tokens(name: str) -> int:
        async with open_model(name) as model:
            reply = await model.complete((Message(role="user", content="Hello"),), Sampling(max_tokens=1))
            return reply.usage.prompt_tokens

    tokenizer = load_tokenizer(base, file)
    chat = [{"role": "user", "content": "Hello"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert asyncio.run(prompt_tokens(f"local/{base}:{sft}")) == len(expected)
    assert asyncio.run(prompt_tokens(f"local/{base}")) != len(expected)


def test_a_reward_model_of_another_chat_template_is_refused(
    rows: Path, base: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    other = RM.model_copy(update={**ONE_STEP, "template_path": file})
    reward = train_reward_model(rows, base, other, tmp_path / "rm")
    with pytest.raises(TrainingError, match="trained with another chat template than the policy's"):
        train_grpo(rows, base, sft_adapter, reward, GRPO, tmp_path / "grpo")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "cannot be read"),
        ("{% for m in messages %}{{ m.content }}", "not a working chat template"),
        ("{{ raise_exception('no') }}", r"not a working chat template \(no\)"),
        ("Hello!", "leaves messages out"),
    ],
)
def test_a_chat_template_that_does_not_work_is_named(base: Path, tmp_path: Path, template: str, words: str) -> None:
    file = tmp_path / "chat.jinja"
    if template is not None:
        file.write_text(template)
    with pytest.raises(ConfigError, match=f"chat.jinja: .*{words}"):
        load_tokenizer(base, file)
