"""The HTTP client against a faulty local server: every fault ends as the right error, nothing is made up."""

import asyncio
import gc
import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from faulty_server import FAULTS, Answer, FaultyServer, choices, error, reply
from sotopia_rl.episode import Sampling
from sotopia_rl.errors import BudgetError, ConfigError, EndpointDownError, ModelCallError
from sotopia_rl.llm.endpoint import key_variable
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import ModelPool, open_model
from sotopia_rl.llm.structured import ask, extract_json
from sotopia_rl.models import Message

ASKED = [Message(role="user", content="hello")]
SAMPLING = Sampling(temperature=0.3, top_p=0.9, max_tokens=50)
QUICK = ModelLimits(backoff_seconds=0.001, timeout_seconds=30, max_retries=2)
HASTY = QUICK.model_copy(update={"timeout_seconds": 0.3})
"""For the one fault that the deadline ends; a busy machine must meet it otherwise."""
KEY = "sk-test-0123456789abcdef"


def call(server, *, limits=QUICK, count=1, **arguments):
    """`count` calls at once; their replies or errors."""

    async def run():
        async with open_model(f"custom/any@{server.url}", limits) as model:
            calls = [model.complete(ASKED, SAMPLING, **arguments) for _ in range(count)]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def failure(server, **arguments):
    (result,) = call(server, **arguments)
    assert isinstance(result, ModelCallError), result
    assert "\n" not in str(result)
    assert str(result).startswith(f"custom/any@{server.url}: ")
    return result


def test_a_call_sends_what_was_asked_and_returns_what_was_said():
    with FaultyServer([reply('{"ä": "李雷"}')]) as server:
        (answer,) = call(server, seed=7)
    assert answer.text == '{"ä": "李雷"}'
    assert answer.finish_reason == "stop"
    assert answer.usage.model_dump() == {"calls": 1, "prompt_tokens": 10, "completion_tokens": 5, "cost_usd": 0.0}
    assert server.bodies[0] == {
        "model": "any",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.3,
        "top_p": 0.9,
        "max_tokens": 50,
        "seed": 7,
    }
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("fault", "kind", "attempts", "words"),
    [
        ("400", "http_4xx", 1, "HTTP 400: bad request"),
        ("401", "http_4xx", 1, "Incorrect API key"),
        ("404", "http_4xx", 1, "no such model"),
        ("429", "rate_limited", 3, "slow down"),
        ("500", "http_5xx", 3, "HTTP 500: broken"),
        ("503-html", "http_5xx", 3, "HTTP 503: 503 Service Unavailable"),
        ("closed", "connection", 3, "connection lost"),
        ("half", "connection", 3, "connection lost"),
        ("hang", "timeout", 3, "no reply within 0.3 seconds"),
        ("html", "bad_reply", 3, "not JSON"),
        ("empty", "bad_reply", 3, "not JSON"),
        ("null", "bad_reply", 3, "no choices"),
        ("list", "bad_reply", 3, "no choices"),
        ("truncated", "bad_reply", 3, "not JSON"),
        ("no-choices", "bad_reply", 3, "no choices"),
        ("null-content", "bad_reply", 3, "no text"),
        ("surrogate", "bad_reply", 3, "hex escape"),
        ("not-utf8", "bad_reply", 3, "not JSON"),
        ("redirect", "bad_reply", 1, "HTTP 302"),
    ],
)
def test_a_fault_ends_as_its_kind_after_bounded_attempts(fault, kind, attempts, words):
    with FaultyServer([fault]) as server:
        found = failure(server, limits=HASTY if fault == "hang" else QUICK)
    assert found.kind == kind
    assert words in str(found)
    assert len(server.bodies) == attempts


def test_a_seed_is_kept_back_from_servers_that_take_none():
    with FaultyServer([reply("ok")]) as server:
        call(server, seed=7, limits=QUICK.model_copy(update={"send_seed": False}))
    assert "seed" not in server.bodies[0]


@pytest.mark.parametrize("fault", ["429", "500", "503-html", "closed", "half", "hang", "html", "null-content"])
def test_a_fault_that_passes_is_survived(fault):
    with FaultyServer([fault, fault, reply("fine")]) as server:
        (answer,) = call(server, limits=HASTY if fault == "hang" else QUICK)
    assert answer.text == "fine"


def test_every_fault_of_the_server_is_tested():
    tested = {row[0] for row in test_a_fault_ends_as_its_kind_after_bounded_attempts.pytestmark[0].args[1]}
    assert tested == set(FAULTS)


def test_a_slow_body_counts_toward_the_deadline():
    with FaultyServer([Answer(body=b"{", close="", seconds=5)]) as server:
        start = time.monotonic()
        assert failure(server, limits=HASTY.model_copy(update={"max_retries": 0})).kind == "timeout"
    assert time.monotonic() - start < 2


def test_retry_after_in_seconds_is_honoured():
    with FaultyServer([error(429, "slow", Retry_After="1"), reply("fine")]) as server:
        (answer,) = call(server)
    assert answer.text == "fine"
    assert server.times[1] - server.times[0] > 0.8


def test_retry_after_as_a_date_is_honoured():
    date = (datetime.now(UTC) + timedelta(seconds=1.3)).replace(microsecond=0)  # in 0.3 to 1.3 seconds
    with FaultyServer([error(429, "slow", Retry_After=format_datetime(date, usegmt=True)), reply("fine")]) as server:
        (answer,) = call(server)
    assert answer.text == "fine"
    asked_again = datetime.now(UTC) - timedelta(seconds=time.monotonic() - server.times[1])
    assert asked_again > date - timedelta(seconds=0.02)


def test_retry_after_is_capped():
    with FaultyServer([error(503, "later", Retry_After="9999"), reply("fine")]) as server:
        (answer,) = call(server, limits=QUICK.model_copy(update={"max_wait_seconds": 0.2}))
    assert answer.text == "fine"
    assert server.times[1] - server.times[0] < 2


@pytest.mark.parametrize("value", ["soon", "-5", "inf", "nan", ""])
def test_a_strange_retry_after_is_ignored(value):
    with FaultyServer([error(429, "slow", Retry_After=value), reply("fine")]) as server:
        (answer,) = call(server)
    assert answer.text == "fine"


def test_a_spent_quota_is_not_retried():
    with FaultyServer([error(429, "insufficient_quota: You exceeded your current quota")]) as server:
        assert failure(server).kind == "http_4xx"
    assert len(server.bodies) == 1


def test_calls_in_flight_are_limited():
    with FaultyServer([reply("fine", seconds=0.02)]) as server:
        answers = call(server, count=20, limits=ModelLimits(max_in_flight=4))
    assert [answer.text for answer in answers] == ["fine"] * 20
    assert server.most_at_once == 4


def test_calls_per_minute_are_limited():
    with FaultyServer([reply("fine")]) as server:
        call(server, count=6, limits=ModelLimits(max_per_minute=600))
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert server.times[-1] - server.times[0] > 0.45
    assert min(gaps) > 0.05


def test_models_of_one_endpoint_share_its_limits():
    with FaultyServer([reply("fine", seconds=0.02)]) as server:

        async def run():
            async with ModelPool(ModelLimits(max_in_flight=3)) as pool:
                models = [pool.get(f"custom/{name}@{server.url}") for name in "ab"]
                assert pool.get(f"custom/a@{server.url}") is models[0]
                await asyncio.gather(*(m.complete(ASKED, SAMPLING) for m in models for _ in range(6)))

        asyncio.run(run())
    assert server.most_at_once == 3
    assert {body["model"] for body in server.bodies} == {"a", "b"}


def test_a_cut_reply_says_so_and_asking_refuses_it():
    with FaultyServer([reply('{"a": 1}', finish_reason="length"), reply('{"a": 2}')]) as server:

        async def run():
            async with open_model(f"custom/any@{server.url}", QUICK) as model:
                return await ask(model, "say", extract_json, sampling=SAMPLING)

        answer = asyncio.run(run())
    assert answer.value == {"a": 2}
    assert answer.attempts == 2
    assert answer.usage.calls == 2
    assert "cut off at the token limit of 50 tokens" in server.bodies[1]["messages"][-1]["content"]


def test_a_model_that_thought_up_to_its_limit_gives_an_empty_cut_reply():
    with FaultyServer([reply(None, finish_reason="length")]) as server:
        (answer,) = call(server)
    assert (answer.text, answer.finish_reason) == ("", "length")


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": "7"}, [], "none"])
def test_missing_usage_counts_as_a_call_of_no_known_tokens(usage):
    with FaultyServer([reply("fine", usage=usage)]) as server:
        (answer,) = call(server)
    assert answer.usage.calls == 1
    assert answer.usage.prompt_tokens == 0


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def test_a_schema_is_sent_as_response_format():
    with FaultyServer([reply("{}")]) as server:
        call(server, schema=SCHEMA)
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == SCHEMA


def test_a_refused_schema_is_left_out_and_not_sent_again():
    def strict(body):
        return error(400, "response_format is not supported") if "response_format" in body else reply("{}")

    with FaultyServer([strict]) as server:

        async def run():
            async with ModelPool(QUICK) as pool:
                for name in "aab":
                    model = pool.get(f"custom/{name}@{server.url}")
                    assert (await model.complete(ASKED, SAMPLING, schema=SCHEMA)).text == "{}"

        asyncio.run(run())
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False]


def test_an_endpoint_that_was_never_there_is_given_up_at_once():
    with FaultyServer([reply("fine")]) as server:
        pass  # closed again: nothing listens there now
    results = call(server, count=50, limits=ModelLimits(backoff_seconds=0.01))
    assert all(isinstance(result, EndpointDownError) for result in results)
    assert "cannot connect" in str(results[0])
    assert results[0].kind == "connection"


def test_a_wrong_key_is_given_up_after_three_calls():
    with FaultyServer(["401"]) as server:

        async def run():
            async with open_model(f"custom/any@{server.url}", QUICK) as model:
                return [
                    (await asyncio.gather(model.complete(ASKED, SAMPLING), return_exceptions=True))[0] for _ in range(9)
                ]

        results = asyncio.run(run())
    assert len(server.bodies) == 3
    assert [type(result) for result in results] == [ModelCallError] * 3 + [EndpointDownError] * 6
    assert "SOTOPIA_RL_KEY_127_0_0_1" in str(results[0])
    assert "not set" in str(results[0])


def test_an_endpoint_that_worked_is_given_more_time():
    with FaultyServer([reply("fine"), "500"]) as server:

        async def run(limits):
            async with open_model(f"custom/any@{server.url}", limits) as model:
                await model.complete(ASKED, SAMPLING)
                calls = [model.complete(ASKED, SAMPLING) for _ in range(9)]
                return await asyncio.gather(*calls, return_exceptions=True)

        patient = asyncio.run(run(QUICK))
        server.bodies.clear()
        hasty = asyncio.run(run(QUICK.model_copy(update={"down_after_seconds": 0.0})))
    assert not any(isinstance(result, EndpointDownError) for result in patient)
    assert any(isinstance(result, EndpointDownError) for result in hasty)
    assert hasty[-1].kind == "http_5xx"


def test_a_bad_request_says_nothing_about_the_endpoint():
    with FaultyServer(["400"] * 8 + [reply("fine")]) as server:
        results = [*call(server, count=8, limits=QUICK.model_copy(update={"down_after_seconds": 0.0}))]
        assert not any(isinstance(result, EndpointDownError) for result in results)


def spend(server, *, cap, calls, at_once, price=(1000.0, 1000.0)):
    name = f"custom/any@{server.url}"
    limits = ModelLimits(max_spend_usd=cap, prices={"custom/*": price}, max_in_flight=at_once)

    async def run():
        async with ModelPool(limits) as pool:
            sampling = Sampling(max_tokens=10)
            tasks = [pool.get(name).complete(ASKED, sampling) for _ in range(calls)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            return results, pool.budget.spent_usd, pool.tallies()[name]

    return asyncio.run(run())


@pytest.mark.parametrize("at_once", [1, 16])
def test_the_spend_cap_is_not_passed(at_once):
    # a reply costs 15 tokens at 0.001 USD
    with FaultyServer([reply("fine", seconds=0.01)]) as server:
        results, spent, tally = spend(server, cap=0.3, calls=40, at_once=at_once)
    refused = [result for result in results if isinstance(result, BudgetError)]
    assert 0.2 < spent <= 0.3
    assert spent == pytest.approx(0.015 * tally.calls)
    assert len(refused) == 40 - tally.calls == tally.failed
    assert refused[0].kind == "budget"
    assert "max_spend_usd" in str(refused[0])
    assert len(server.bodies) == tally.calls


def test_a_paid_reply_without_usage_is_charged_at_its_dearest():
    with FaultyServer([reply("fine", usage=None)]) as server:
        _, spent, _ = spend(server, cap=1.0, calls=1, at_once=1)
    assert spent >= 0.01  # ten tokens of reply


def test_a_failed_call_frees_its_reserve():
    with FaultyServer(["400", reply("fine")]) as server:
        results, _, _ = spend(server, cap=0.15, calls=2, at_once=1)
    assert isinstance(results[0], ModelCallError)
    assert results[1].text == "fine"


def test_a_cap_with_an_unknown_price_is_refused():
    with pytest.raises(ConfigError, match="price is not known"):
        asyncio.run(opened("custom/any@http://127.0.0.1:9/v1", ModelLimits(max_spend_usd=1)))


async def opened(name, limits=None):
    async with open_model(name, limits) as model:
        return model


def test_an_unknown_price_is_said_to_be_unknown():
    with FaultyServer([reply("fine")]) as server:
        name = f"custom/any@{server.url}"

        async def run(limits):
            async with ModelPool(limits) as pool:
                await pool.get(name).complete(ASKED, SAMPLING)
                return pool.tallies()[name]

        assert not asyncio.run(run(ModelLimits())).cost_known
        tally = asyncio.run(run(ModelLimits(prices={name: (1.0, 2.0)})))
    assert tally.cost_known
    assert tally.cost_usd == pytest.approx(20e-6)


def test_each_endpoint_has_a_key_variable_of_its_own():
    assert key_variable("http://localhost:8000/v1") == "SOTOPIA_RL_KEY_LOCALHOST_8000"
    assert key_variable("https://api.example.com/v1") == "SOTOPIA_RL_KEY_API_EXAMPLE_COM"


LEAKS = [
    error(401, f"Incorrect API key provided: {KEY}. Also sk-te**********cdef"),
    error(500, f"Authorization: Bearer {KEY} " + "x" * 500),
    Answer(body=f"<html>{KEY}</html>".encode()),
    Answer(body=f'{{"choices": [{{"message": {{"content": null, "refusal": "{KEY}"}}}}]}}'.encode()),
    Answer(body=f'{{"error": "{KEY}"}}'.encode()),
    "closed",
    "hang",
]


@pytest.mark.parametrize("leak", LEAKS, ids=range(len(LEAKS)))
def test_a_key_is_sent_and_shows_up_nowhere_else(leak, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with FaultyServer([leak]) as server:
        monkeypatch.setenv(key_variable(server.url), KEY)

        async def run():
            async with ModelPool(HASTY.model_copy(update={"max_retries": 0}) if leak == "hang" else QUICK) as pool:
                model = pool.get(f"custom/any@{server.url}")
                with pytest.raises(ModelCallError) as caught:
                    await model.complete(ASKED, SAMPLING)
                return [model.name, model, pool, vars(model), model.endpoint, caught.value, caught.value.args], caught

        shown, caught = asyncio.run(run())
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    chain = [caught.value.__cause__, caught.getrepr(chain=True)]
    for thing in [*shown, *chain, caplog.text]:
        assert KEY not in str(thing)
        assert KEY not in repr(thing)
        assert "cdef" not in str(thing)


def test_a_key_in_a_reply_is_taken_out(monkeypatch):
    with FaultyServer([reply(f"your key is {KEY}")]) as server:
        monkeypatch.setenv(key_variable(server.url), KEY)
        (answer,) = call(server)
    assert answer.text == "your key is [key]"


def test_a_key_that_no_header_takes_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("SOTOPIA_RL_KEY_LOCALHOST", f"{KEY}\nX-Evil: 1")
    with pytest.raises(ConfigError) as caught:
        asyncio.run(opened("custom/any@http://localhost/v1"))
    assert KEY not in str(caught.value)


def test_openai_takes_its_own_key_and_its_own_limit_field(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        asyncio.run(opened("openai/gpt-4o"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    model = asyncio.run(opened("openai/gpt-4o-2024-11-20"))
    assert model.max_tokens_field == "max_completion_tokens"
    assert model.price.prompt == 2.5
    assert str(model.endpoint.address) == "https://api.openai.com/v1/chat/completions"
    assert KEY not in repr(model)


def test_a_cancelled_call_closes_its_connection_and_frees_its_place():
    with FaultyServer(["hang", reply("fine")]) as server:

        async def run():
            async with open_model(f"custom/any@{server.url}", ModelLimits(max_in_flight=1)) as model:
                task = asyncio.ensure_future(model.complete(ASKED, SAMPLING))
                await asyncio.sleep(0.1)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return await model.complete(ASKED, SAMPLING)

        assert asyncio.run(run()).text == "fine"
    gc.collect()  # a connection left open would warn here


def many(server, n, *, limits=QUICK, calls=1):
    """What calls for n replies gave, one after the other; the model's tally; what was spent."""

    async def run():
        async with ModelPool(limits) as pool:
            model = pool.get(f"custom/any@{server.url}")
            found = [await model.complete_many(ASKED, SAMPLING, n, seed=7) for _ in range(calls)]
            return found, model, pool.budget.spent_usd

    return asyncio.run(run())


def test_many_replies_come_from_one_call_whose_usage_the_first_carries():
    with FaultyServer([choices("a", "b", "c")]) as server:
        (replies,), model, _ = many(server, 3)
    assert [reply.text for reply in replies] == ["a", "b", "c"]
    assert [(reply.usage.calls, reply.usage.prompt_tokens) for reply in replies] == [(1, 10), (0, 0), (0, 0)]
    assert (model.tally.calls, model.tally.completion_tokens) == (1, 15)
    assert (server.bodies[0]["n"], server.bodies[0]["seed"]) == (3, 7)
    assert model.gives_many


def test_a_server_that_ignores_n_is_known_from_then_on():
    with FaultyServer([reply("a")]) as server:
        (replies,), model, _ = many(server, 3)
    assert [reply.text for reply in replies] == ["a"]
    assert not model.gives_many


def test_a_choice_that_is_no_reply_is_left_out_and_says_nothing_about_n():
    with FaultyServer([choices(None, "b")]) as server:
        (replies,), model, _ = many(server, 2)
    assert [(reply.text, reply.usage.calls) for reply in replies] == [("b", 1)]
    assert model.gives_many


def test_a_call_for_many_replies_may_cost_as_much_as_all_of_them():
    # 50 tokens of reply at 0.001 USD may come three times; 10 of prompt and 15 of reply do
    prices = {"custom/*": (1000.0, 1000.0)}
    with FaultyServer([choices("a", "b", "c")]) as server:
        _, _, spent = many(server, 3, limits=ModelLimits(max_spend_usd=0.3, prices=prices))
        assert spent == pytest.approx(0.025)
        with pytest.raises(BudgetError):
            many(server, 6, limits=ModelLimits(max_spend_usd=0.3, prices=prices))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(("n", "hint"), [(1, False), (2, True)])
def test_a_refused_request_for_many_replies_says_what_to_do(n, hint):
    with FaultyServer(["400"]) as server, pytest.raises(ModelCallError) as caught:
        many(server, n)
    assert ("--no-share-prompt" in str(caught.value)) == hint
