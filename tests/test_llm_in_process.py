"""Transformers in this process: batches that do not touch each other, adapters on one base, schemas kept."""

import asyncio
import json
import random
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from sotopia_rl.episode import Sampling
from sotopia_rl.errors import ConfigError, ModelCallError
from sotopia_rl.llm.decode import Row, decode
from sotopia_rl.llm.extract import extract_json
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import ModelPool, open_model
from sotopia_rl.models import Message
from tiny_llm import save_adapter, save_model

GREEDY = Sampling(temperature=0, max_tokens=12)
WARM = Sampling(temperature=1.0, max_tokens=12)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["speak", "leave"]}, "points": {"type": "integer"}},
    "required": ["kind", "points"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_model(root / "base")
    save_adapter(base, root / "one", seed=1)
    save_adapter(base, root / "two", seed=2)
    return root


def chat(text):
    return [Message(role="user", content=text)]


def texts(name, prompts, sampling, *, limits=None, schema=None, seeds=None):
    async def run():
        async with open_model(name, limits) as model:
            calls = [
                model.complete(chat(p), sampling, seed=seeds[i] if seeds else i, schema=schema)
                for i, p in enumerate(prompts)
            ]
            return await asyncio.gather(*calls)

    return asyncio.run(run())


def test_greedy_replies_equal_those_of_transformers_generate(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    model = AutoModelForCausalLM.from_pretrained(folders / "base").eval()
    prompts = ["hello", "a much longer prompt than the first one, to make padding", "x"]
    replies = texts(f"local/{folders / 'base'}", prompts, GREEDY)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = made[0, ids["input_ids"].shape[1] :]
        assert reply.text == tokenizer.decode(new, skip_special_tokens=True)
        assert reply.usage.prompt_tokens == ids["input_ids"].shape[1]


def test_a_sampled_reply_does_not_depend_on_its_batch(folders):
    name = f"local/{folders / 'base'}"
    prompts = [f"prompt {'x' * (7 * i)}" for i in range(9)]
    together = texts(name, prompts, WARM)
    alone = texts(name, prompts, WARM, limits=ModelLimits(max_batch=1))
    small = texts(name, prompts, WARM, limits=ModelLimits(max_batch_tokens=150))
    assert [r.text for r in together] == [r.text for r in alone] == [r.text for r in small]


def test_a_seed_repeats_a_reply_and_another_seed_gives_another(folders):
    first, again, other = texts(f"local/{folders / 'base'}", ["hello"] * 3, WARM, seeds=[5, 5, 6])
    assert first == again
    assert first.text != other.text


def test_sampling_follows_the_model_s_distribution(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    model = AutoModelForCausalLM.from_pretrained(folders / "base").eval()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "go"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        probabilities = model(**ids).logits[0, -1].softmax(-1)
    count = 600
    replies = texts(f"local/{folders / 'base'}", ["go"] * count, Sampling(temperature=1, max_tokens=1))
    seen = Counter(reply.text for reply in replies)
    # several tokens are no whole character and read alike, so take the likeliest that is one
    token = max((t for t in range(len(tokenizer)) if tokenizer.decode([t]).isalnum()), key=lambda t: probabilities[t])
    share = seen[tokenizer.decode([token])] / count
    expected = float(probabilities[token])
    assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5 + 1e-3


def test_a_small_top_p_leaves_only_the_likeliest_token(folders):
    name = f"local/{folders / 'base'}"
    narrow = texts(name, ["hello"] * 4, Sampling(temperature=1, top_p=1e-6, max_tokens=12))
    greedy = texts(name, ["hello"], GREEDY)
    assert {reply.text for reply in narrow} == {greedy[0].text}


def test_requests_of_different_settings_share_a_batch(folders):
    async def run():
        async with open_model(f"local/{folders / 'base'}") as model:
            settings = [
                GREEDY,
                WARM,
                Sampling(temperature=1, max_tokens=3),
                Sampling(temperature=0.5, top_p=0.5, max_tokens=9),
            ]
            return await asyncio.gather(*(model.complete(chat("hello"), s, seed=1) for s in settings))

    replies = asyncio.run(run())
    assert replies[0].text == texts(f"local/{folders / 'base'}", ["hello"], GREEDY)[0].text
    assert replies[2].finish_reason == "length"
    assert replies[2].usage.completion_tokens == 3


def test_a_schema_is_kept_beside_rows_without_one(folders):
    async def run():
        async with open_model(f"local/{folders / 'base'}") as model:
            sampling = Sampling(temperature=1, max_tokens=60)
            schemas = [SCHEMA, None] * 4
            return await asyncio.gather(
                *(model.complete(chat("hi"), sampling, seed=i, schema=s) for i, s in enumerate(schemas))
            )

    for reply in asyncio.run(run())[::2]:
        if reply.finish_reason == "stop":  # an integer may run on to the limit
            assert set(extract_json(reply.text)) == {"kind", "points"}
    assert any(reply.finish_reason == "stop" for reply in asyncio.run(run())[::2])


def test_adapters_share_one_base_and_each_gives_its_own_replies(folders):
    names = [f"local/{folders / 'base'}{suffix}" for suffix in ("", f":{folders / 'one'}", f":{folders / 'two'}")]

    async def run():
        async with ModelPool() as pool:
            models = [pool.get(name) for name in names]
            assert len({id(model.base) for model in models}) == 1
            calls = [m.complete(chat("hello"), GREEDY) for _ in range(2) for m in models]
            return [reply.text for reply in await asyncio.gather(*calls)]

    together = asyncio.run(run())
    alone = [texts(name, ["hello"], GREEDY)[0].text for name in names]
    assert together == alone * 2
    assert len(set(alone)) == 3


def test_the_pool_counts_calls_and_tokens(folders):
    name = f"local/{folders / 'base'}"

    async def run():
        async with ModelPool() as pool:
            await pool.get(name).complete(chat("hello"), Sampling(temperature=1, max_tokens=3), seed=0)
            return pool.tallies()[name]

    tally = asyncio.run(run())
    assert tally.calls == 1
    assert tally.prompt_tokens > 5
    assert tally.completion_tokens <= 3
    assert tally.cost_usd == 0


def test_a_prompt_longer_than_the_context_is_refused_and_its_neighbours_are_answered(folders):
    async def run():
        async with open_model(f"local/{folders / 'base'}") as model:
            calls = [model.complete(chat(text), GREEDY) for text in ("hello", "x" * 600)]
            return await asyncio.gather(*calls, return_exceptions=True)

    fine, refused = asyncio.run(run())
    assert fine.text
    assert isinstance(refused, ModelCallError)
    assert refused.kind == "model"
    assert "context is 512" in str(refused)


def test_a_reply_ends_at_the_context_s_end(folders):
    reply = texts(f"local/{folders / 'base'}", ["x" * 470], Sampling(temperature=1, max_tokens=300))[0]
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens <= 512


def test_a_cancelled_request_leaves_the_others_alone(folders):
    async def run():
        async with open_model(f"local/{folders / 'base'}") as model:
            tasks = [asyncio.ensure_future(model.complete(chat("hello"), WARM, seed=i)) for i in range(4)]
            await asyncio.sleep(0)
            tasks[1].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    replies = asyncio.run(run())
    assert isinstance(replies[1], asyncio.CancelledError)
    assert [replies[i].text for i in (0, 2, 3)] == [
        texts(f"local/{folders / 'base'}", ["hello"], WARM, seeds=[i])[0].text for i in (0, 2, 3)
    ]


def test_closing_does_not_wait_for_replies_that_nobody_wants():
    forever = Row([5], 10**6, temperature=1.0, top_p=1.0, stream=random.Random(0))
    kept = Row([5], 4, temperature=1.0, top_p=1.0, stream=random.Random(0))
    finished = []
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()
    decode(model, [forever, kept], pad_token=0, stop_tokens=(), done=finished.append, wanted=lambda r: r is kept)
    assert finished == [kept]
    assert len(forever.tokens) == 1


def refusal(name):
    async def run():
        async with open_model(name) as model:
            await model.complete(chat("hello"), GREEDY)

    with pytest.raises(ConfigError) as caught:
        asyncio.run(run())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_no_model_is_named(folders, tmp_path):
    assert "no such folder" in refusal(f"local/{tmp_path / 'missing'}")
    assert "no config.json" in refusal(f"local/{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in refusal(f"local/{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "no tokenizer" in refusal(f"local/{tmp_path}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a loadable model" in refusal(f"local/{tmp_path}")
    assert f"write local/{folders / 'base'}:{folders / 'one'}" in refusal(f"local/{folders / 'one'}")


def test_an_adapter_of_another_base_is_refused_with_both_names(folders, tmp_path):
    other = save_model(tmp_path / "other", seed=3)
    message = refusal(f"local/{other}:{folders / 'one'}")
    assert str(other) in message
    assert str(folders / "base") in message
    wide = save_model(tmp_path / "base", hidden_size=64)  # the same folder name, another shape
    config = json.loads((folders / "one" / "adapter_config.json").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    config["base_model_name_or_path"] = "/gone/base"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    (moved / "adapter_model.safetensors").write_bytes((folders / "one" / "adapter_model.safetensors").read_bytes())
    message = refusal(f"local/{wide}:{moved}")
    assert "/gone/base" in message
    assert str(wide) in message


def test_an_adapter_that_was_moved_with_its_base_still_fits(folders, tmp_path):
    (tmp_path / "elsewhere").symlink_to(folders / "base")
    reply = texts(f"local/{tmp_path / 'elsewhere'}:{folders / 'one'}", ["hello"], GREEDY)[0]
    assert reply.text == texts(f"local/{folders / 'base'}:{folders / 'one'}", ["hello"], GREEDY)[0].text


def test_a_reward_adapter_is_no_chat_model(folders, tmp_path):
    save_adapter(folders / "base", tmp_path / "reward", seed=1, task_type="FEATURE_EXTRACTION")
    assert "not for text generation" in refusal(f"local/{folders / 'base'}:{tmp_path / 'reward'}")


@pytest.mark.slow
def test_smollm2_talks_and_keeps_a_schema():
    free, forced = (
        texts("local/smollm2", ["What is the capital of France?"], Sampling(temperature=0, max_tokens=60), schema=s)[0]
        for s in (None, SCHEMA)
    )
    assert "Paris" in free.text
    assert set(extract_json(forced.text)) == {"kind", "points"}
