"""Asking until the reply is usable, a bounded number of times."""

import asyncio
from dataclasses import dataclass, field
from typing import Self

import pytest

from sotopia_rl.episode import Action, Sampling, Usage
from sotopia_rl.errors import ModelCallError, ReplyError
from sotopia_rl.llm.structured import UnusableReply, ask, extract_json
from sotopia_rl.models import Message, Reply
from sotopia_rl.work import failure_of

SAMPLING = Sampling(max_tokens=30)


@dataclass
class Repeater:
    """Says the given replies in turn and remembers what it was asked."""

    replies: list[Reply]
    name: str = "scripted/repeater"
    asked: list[list[Message]] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)

    async def complete(self, messages, sampling, *, seed=None, schema=None):
        self.asked.append(list(messages))
        self.seeds.append(seed)
        return self.replies[len(self.asked) - 1]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass


def said(*texts, **fields):
    usage = Usage(calls=1, prompt_tokens=2, completion_tokens=3)
    return Repeater([Reply(text=text, usage=usage, **fields) for text in texts])


def test_a_usable_reply_is_taken_at_once():
    model = said('{"a": 1}')
    answer = asyncio.run(ask(model, "hello", extract_json, sampling=SAMPLING, seed=4))
    assert (answer.value, answer.attempts, answer.prompt, answer.text) == ({"a": 1}, 1, "hello", '{"a": 1}')
    assert model.asked == [[Message(role="user", content="hello")]]
    assert model.seeds == [4]


def test_a_refused_reply_is_asked_again_with_what_was_wrong_and_another_seed():
    model = said("no idea", '{"a": 1')
    model.replies.append(Reply(text='{"a": 1}'))
    answer = asyncio.run(ask(model, "hello", extract_json, sampling=SAMPLING, seed=4))
    assert answer.attempts == 3
    assert answer.usage.calls == 2
    assert [message.role for message in model.asked[1]] == ["user", "assistant", "user"]
    assert "holds no JSON object" in model.asked[1][2].content
    assert "stops in the middle" in model.asked[2][2].content
    assert model.seeds == [4, 5, 6]


def test_attempts_are_bounded_and_every_reply_is_kept():
    model = said("one", "two", "three")
    with pytest.raises(ReplyError) as caught:
        asyncio.run(ask(model, "hello", extract_json, sampling=SAMPLING, max_attempts=2))
    assert caught.value.replies == ("one", "two")
    assert caught.value.kind == "bad_reply"
    assert "2 attempts" in str(caught.value)


def test_a_reply_cut_at_the_limit_is_refused_though_it_reads_well():
    model = said('{"a": 1}', finish_reason="length")
    with pytest.raises(ReplyError, match="cut off at the token limit of 30 tokens"):
        asyncio.run(ask(model, "hello", extract_json, sampling=SAMPLING, max_attempts=1))


def test_an_empty_reply_is_asked_again_without_an_empty_message():
    model = said("  ", "{}")
    asyncio.run(ask(model, "hello", extract_json, sampling=SAMPLING))
    (message,) = model.asked[1]
    assert message.content.startswith("hello\n\nThat reply cannot be used")


def test_a_validation_error_is_told_in_one_line():
    model = said('{"action_type": "dance"}', '{"action_type": "leave"}')
    answer = asyncio.run(ask(model, "act", lambda text: Action.model_validate(extract_json(text)), sampling=SAMPLING))
    assert answer.value == Action(action_type="leave")
    note = model.asked[1][2].content.splitlines()[0]
    assert "action_type: Input should be" in note
    assert "http" not in note


def test_a_bug_in_a_parser_is_no_refusal():
    def parse(text):
        raise KeyError(text)

    with pytest.raises(KeyError):
        asyncio.run(ask(said("{}"), "hello", parse, sampling=SAMPLING))


def test_unusable_reply_is_a_value_error():
    assert issubclass(UnusableReply, ValueError)


def test_what_refused_replies_took_goes_with_the_error():
    with pytest.raises(ReplyError) as refused:
        asyncio.run(ask(said("no", "no"), "hello", extract_json, sampling=SAMPLING, max_attempts=2))
    assert refused.value.usage == Usage(calls=2, prompt_tokens=4, completion_tokens=6)
    assert failure_of(refused.value).usage.calls == 2


def test_a_call_that_fails_after_a_refused_reply_takes_the_bill_with_it():
    class Dying(Repeater):
        async def complete(self, messages, sampling, *, seed=None, schema=None):
            if self.asked:
                raise ModelCallError("gone", model=self.name, kind="connection")
            return await Repeater.complete(self, messages, sampling, seed=seed, schema=schema)

    with pytest.raises(ModelCallError) as broken:
        asyncio.run(ask(Dying(said("no").replies), "hello", extract_json, sampling=SAMPLING))
    assert broken.value.usage == Usage(calls=1, prompt_tokens=2, completion_tokens=3)
    assert failure_of(ModelCallError("x", model="m", kind="timeout")).usage == Usage()
