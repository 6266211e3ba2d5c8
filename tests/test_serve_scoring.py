"""Scoring in shared batches: the same numbers as alone, one batch at a time, nobody's trouble anybody else's."""

import asyncio
import json
import shutil
import threading
from contextlib import asynccontextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from faulty_server import Answer, FaultyServer
from running_servers import ByLength
from sotopia_rl.errors import ConfigError, DataError, ServingError, TrainingError
from sotopia_rl.models import Message
from sotopia_rl.serve.best_of_n import BestOfNSettings
from sotopia_rl.serve.reward_model import load_reward_model
from sotopia_rl.serve.run import open_reward_model
from sotopia_rl.serve.scoring import Batcher, ChatEncoder, PoolingServer, TooLongError
from sotopia_rl.train.adapters import RewardScorer, load_policy
from sotopia_rl.train.config import TrainerSettings
from sotopia_rl.train.data import completion_token_ids, prompt_token_ids, reply_text
from sotopia_rl.train.loading import load_tokenizer
from tiny_llm import save_adapter, save_model, save_reward_adapter
from training_rows import reward_rows

PROMPT = [Message(role="user", content="Hello?")]


class Slow(ByLength):
    """Waits in its first batch until it is told to go on; cannot encode the reply `poison`."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.go_on = threading.Event(), threading.Event()

    def encode_one(self, prompt, replies):
        if "poison" in replies:
            raise TooLongError("poison")
        return super().encode_one(prompt, replies)

    def score(self, pairs):
        self.started.set()
        assert self.go_on.wait(10)
        return super().score(pairs)


@given(st.lists(st.lists(st.text(max_size=5), min_size=1, max_size=4), max_size=12), st.integers(1, 9))
def test_scores_do_not_depend_on_who_else_is_scored(requests, max_batch):
    async def run():
        async with Batcher(ByLength(), max_batch=max_batch, wait_seconds=0) as batcher:
            return await asyncio.gather(*(batcher.score(PROMPT, replies) for replies in requests))

    assert asyncio.run(run()) == [[(1 / (1 + len(reply)),) for reply in replies] for replies in requests]


def scored(model, requests, during=lambda _: None, **options):
    """Outcomes of requests, the first of which occupies the model while the others arrive and `during` happens."""

    async def run():
        async with Batcher(model, wait_seconds=0, **options) as batcher:
            tasks = [asyncio.create_task(batcher.score(PROMPT, requests[0]))]
            await asyncio.to_thread(model.started.wait)
            tasks += [asyncio.create_task(batcher.score(PROMPT, replies)) for replies in requests[1:]]
            await asyncio.sleep(0.01)
            during(tasks)
            model.go_on.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(run())


def test_what_arrives_during_a_batch_shares_the_next_one():
    model = Slow()
    scored(model, [["a"], ["bb"], ["ccc"], ["dddd", "bb"]])
    assert model.batches == [1, 3]  # "bb" twice, scored once


def test_a_batch_has_an_end_and_requests_are_not_divided():
    model = Slow()
    scored(model, [["a"], ["bb", "ccc"], ["dddd", "eeeee"], ["ffffff"]], max_batch=3)
    assert model.batches == [1, 2, 3]


def test_a_request_that_cannot_be_encoded_fails_alone():
    first, poisoned, last = scored(Slow(), [["a"], ["poison"], ["bb"]])
    assert isinstance(poisoned, TooLongError)
    assert (first, last) == ([(1 / 2,)], [(1 / 3,)])


def test_nobody_s_request_is_not_scored():
    model = Slow()
    scored(model, [["a"], ["bb"], ["ccc"]], during=lambda tasks: tasks[1].cancel())
    assert model.batches == [1, 1]


@asynccontextmanager
async def occupied():
    """A batcher whose model has been started on the reply "a", that model, and the task which waits for it."""
    model = Slow()
    async with Batcher(model, wait_seconds=0) as batcher:
        task = asyncio.create_task(batcher.score(PROMPT, ["a"]))
        await asyncio.to_thread(model.started.wait)
        yield batcher, model, task


def test_whether_a_prompt_fits_is_found_out_while_others_are_scored():
    async def run():
        async with occupied() as (batcher, model, scoring):
            assert await asyncio.wait_for(batcher.score(PROMPT, []), 5) == []
            assert not scoring.done()
            model.go_on.set()
            await scoring

    asyncio.run(run())


def test_the_next_batch_is_in_work_before_the_results_of_the_last_are_out():
    async def run():
        async with occupied() as (batcher, model, first):
            second = asyncio.create_task(batcher.score(PROMPT, ["bb"]))
            await asyncio.sleep(0)
            assert await batcher.score(PROMPT, []) == []  # tokenised after "bb", which now waits for the model
            assert batcher.depth == 1
            model.go_on.set()
            await first
            assert batcher.depth == 0
            await second

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_waits_when_the_server_ends_is_told():
    async def run():
        async with occupied() as (batcher, model, first):
            tasks = [first, asyncio.create_task(batcher.score(PROMPT, ["b"]))]
            await asyncio.sleep(0.01)
            model.go_on.set()
        with pytest.raises(ServingError, match="not running"):
            await batcher.score(PROMPT, ["c"])
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

    for outcome in asyncio.run(run()):
        assert isinstance(outcome, ServingError)
        assert "shutting down" in str(outcome)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("scored") / "base", context=4096)


@pytest.fixture(scope="module")
def reward_adapter(base):
    return save_reward_adapter(base, base.parent / "reward", seed=1, outputs=2)


@pytest.fixture(scope="module")
def loaded(reward_adapter):
    return load_reward_model(reward_adapter)


@pytest.fixture(scope="module")
def some_rows():
    return reward_rows(4)


def encoded(model, rows):
    return [pair for (pair,) in model.encode([(row.prompt, [reply_text(row)]) for row in rows])]


def test_a_reward_model_reads_prompts_in_the_chat_template_it_was_trained_with(reward_adapter, tmp_path, some_rows):
    other = shutil.copytree(reward_adapter, tmp_path / "rm")
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} so:")
    model = load_reward_model(other)
    ((prompt, _),) = encoded(model, some_rows[:1])
    assert model.encoder.tokenizer.decode(prompt) == some_rows[0].prompt[0].content + " so:"


def test_a_loaded_reward_model_scores_as_the_one_that_grpo_uses(base, reward_adapter, loaded, some_rows, tmp_path):
    tokenizer = load_tokenizer(base)
    policy = load_policy(base, save_adapter(base, tmp_path, seed=2), tokenizer, TrainerSettings())
    scorer = RewardScorer(policy, reward_adapter, batch_size=8)
    ids = [
        (prompt_token_ids(tokenizer, row.prompt), completion_token_ids(tokenizer, reply_text(row))) for row in some_rows
    ]
    pairs = encoded(loaded, some_rows)
    assert [(list(prompt), list(reply)) for prompt, reply in pairs] == ids
    found = torch.tensor(loaded.score(pairs))
    assert torch.allclose(found, scorer.score(ids), atol=1e-5)
    assert loaded.outputs == ("output_0", "output_1")
    assert found.std(dim=0).min() > 0


def test_a_batch_changes_no_score(loaded, some_rows, reward_adapter):
    """Replies of several lengths to prompts of several lengths, some sharing one; whole, in parts and alone."""
    (several,) = loaded.encode([(some_rows[3].prompt, ["", "a", "b" * 70, "c" * 300])])
    pairs = encoded(loaded, some_rows) + several
    alone = torch.tensor([loaded.score([pair])[0] for pair in pairs])
    narrow = load_reward_model(reward_adapter, max_batch_tokens=3000)
    assert torch.allclose(torch.tensor(loaded.score(pairs)), alone, atol=1e-5)
    assert torch.allclose(torch.tensor(narrow.score(pairs)), alone, atol=1e-5)


def test_requests_are_encoded_together_as_each_alone(loaded, some_rows):
    requests = [(row.prompt, ["", reply_text(row), "b" * 7][:count]) for count, row in enumerate(some_rows[:4])]
    requests.append((some_rows[0].prompt, ["another"]))
    assert loaded.encode(requests) == [pairs for request in requests for pairs in loaded.encode([request])]
    assert [len(pairs) for pairs in loaded.encode(requests)] == [0, 1, 2, 3, 1]


class Counting:
    """A tokenizer that counts the prompts it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id, self.prompts = tokenizer, tokenizer.eos_token_id, 0

    def __call__(self, texts, **options):
        return self.tokenizer(texts, **options)

    def apply_chat_template(self, chats, **options):
        self.prompts += len(chats)
        return self.tokenizer.apply_chat_template(chats, **options)


def test_a_prompt_that_comes_before_its_replies_is_tokenised_once_and_forgotten_after_them(base):
    encode = ChatEncoder(counting := Counting(load_tokenizer(base)), max_length=100)
    first = encode([(PROMPT, ["a"])])
    assert encode([(PROMPT, [])]) == [[]]
    assert encode([(PROMPT, ["a"])]) == first
    assert counting.prompts == 2
    assert encode([(PROMPT, ["a"]), (PROMPT, ["b"])])[:1] == first
    assert counting.prompts == 3


def test_what_is_too_long_is_said_with_numbers(reward_adapter):
    model = load_reward_model(reward_adapter, max_length=40)
    with pytest.raises(TooLongError, match=r"prompt and reply have \d\d\d tokens, .* takes 40"):
        model.encode([(PROMPT, ["word " * 40])])
    long = [Message(role="user", content="word " * 40)]
    with pytest.raises(TooLongError, match=r"prompt and reply have at least \d\d\d tokens, .* takes 40"):
        model.encode([(PROMPT, ["ok"]), (long, [])])


def test_a_whole_classifier_scores_as_the_adapter_it_was_made_of(loaded, some_rows, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.encoder.tokenizer.save_pretrained(tmp_path)
    whole = load_reward_model(tmp_path)
    pairs = encoded(whole, some_rows[:4])
    assert torch.allclose(torch.tensor(whole.score(pairs)), torch.tensor(loaded.score(pairs)), atol=1e-6)


def test_what_is_no_reward_model_is_refused(base, reward_adapter, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_reward_model(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither an adapter"):
        load_reward_model(tmp_path)
    with pytest.raises(DataError, match="not a reward model"):
        load_reward_model(base)
    with pytest.raises(ConfigError, match="no score head"):
        load_reward_model(save_adapter(base, tmp_path / "policy", seed=2))
    with pytest.raises(TrainingError, match="was trained on the base"):
        load_reward_model(reward_adapter, base=save_model(tmp_path / "other"))


def pooling(body):
    rows = [{"index": index, "data": [len(ids) / 10]} for index, ids in enumerate(body["input"])]
    return Answer(body=json.dumps({"data": rows[::-1]}).encode())


def test_a_reward_model_on_a_server_gets_token_ids_and_its_answers_go_by_index(base):
    with FaultyServer([pooling], path="/pooling") as server:
        name = f"custom/rm@{server.url}"
        model = open_reward_model(name, BestOfNSettings(), base=base)
        assert model.score([((1,), (2, 3)), ((), (4, 5))]) == [(0.3,), (0.2,)]
        assert server.bodies[-1] == {"model": "rm", "input": [[1, 2, 3], [4, 5]], "use_activation": False}
        assert model.outputs == ("value",)
        with pytest.raises(ConfigError, match="needs --base"):
            open_reward_model(name, BestOfNSettings())


@pytest.mark.parametrize("fault", ["500", "html", "empty", "list", "no-choices", "closed"])
def test_a_reward_server_s_fault_is_no_score(fault):
    with FaultyServer([fault], path="/pooling") as server, pytest.raises(ServingError):
        PoolingServer(server.url, "rm", lambda *_: [], ("value",)).score([((1,), (2,))])
