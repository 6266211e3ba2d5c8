"""Reading prompts in parts gives what reading them whole gives."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sotopia_rl.llm.decode import Row, decode
from sotopia_rl.llm.prefill import BLOCK, PrefixStore, can_prefill, prefill
from tiny_llm import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("prefill") / "base")).eval()


def some_tokens(seed, length):
    source = random.Random(seed)
    return [source.randrange(3, 259) for _ in range(length)]


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_known_beginnings_change_nothing(model, data):
    store = PrefixStore(10**8)
    for _ in range(3):
        parts = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=6)
        prompts = [some_tokens(s, a) + some_tokens(9, b) for s, a, b in data.draw(parts)]
        with torch.inference_mode():
            logits, _ = prefill(model, prompts, room=1, store=store, owner="")
            for prompt, row in zip(prompts, logits, strict=True):
                alone = model(input_ids=torch.tensor([prompt])).logits[0, -1]
                assert torch.allclose(row, alone, atol=2e-4)


def test_a_conversation_decodes_the_same_with_and_without_what_is_known(model):
    def play(store):
        said = []
        for turn in range(1, 5):
            rows = [
                Row(some_tokens(i, 40 * turn), 8, temperature=1.0, top_p=1.0, stream=random.Random(i)) for i in range(6)
            ]
            decode(model, rows, pad_token=0, stop_tokens={2}, done=lambda _: None, store=store)
            said.append([row.tokens for row in rows])
        return said

    assert play(None) == play(PrefixStore(0)) == play(PrefixStore(10**8))


def test_equal_prompts_are_read_once(model):
    read = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    prompts = [some_tokens(0, 30), some_tokens(1, 20), some_tokens(0, 30), some_tokens(0, 30)]
    with torch.inference_mode():
        logits, cache = prefill(model, prompts, room=1, store=PrefixStore(0), owner="")
        hook.remove()
        assert sum(read) == 2 * 30
        alone, cache_alone = prefill(model, prompts[2:3], room=1, store=PrefixStore(0), owner="")
    for row in (0, 2, 3):
        assert torch.allclose(logits[row], alone[0], atol=1e-5)
        assert torch.allclose(cache.layers[1].keys[row], cache_alone.layers[1].keys[0], atol=1e-5)


def states(length):
    return torch.zeros(4, 2, length, 8)


def test_the_longest_whole_block_is_found_and_never_the_whole_prompt():
    store = PrefixStore(10**8)
    prompt = some_tokens(0, 4 * BLOCK)
    store.keep("a", prompt, states(4 * BLOCK))
    assert store.find("a", prompt).shape[2] == 3 * BLOCK
    assert store.find("a", [*prompt, 5]).shape[2] == 4 * BLOCK
    assert store.find("a", [*prompt[: 2 * BLOCK + 3], *some_tokens(1, 50)]).shape[2] == 2 * BLOCK
    assert store.find("a", some_tokens(1, 4 * BLOCK)) is None
    assert store.find("b", prompt) is None


def test_memory_is_bounded_and_the_oldest_goes_first():
    one = states(BLOCK).nbytes
    store = PrefixStore(3 * one)
    prompts = [some_tokens(i, BLOCK) for i in range(4)]
    for prompt in prompts[:3]:
        store.keep("", prompt, states(BLOCK))
    assert store.find("", [*prompts[0], 1]) is not None  # used again, so the second is now the oldest
    store.keep("", prompts[3], states(BLOCK))
    assert [store.find("", [*prompt, 1]) is not None for prompt in prompts] == [True, False, True, True]
    store.keep("", some_tokens(9, 4 * BLOCK), states(4 * BLOCK))  # too large to keep at all
    assert store.find("", [*prompts[3], 1]) is not None


def test_plain_attention_is_recognised(model):
    assert can_prefill(model.config)
