"""The best-of-N server over real HTTP: the best valid reply or an error with a reason, and nothing else, ever."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faulty_server import FAULTS, Answer, FaultyServer, choices, error, reply
from running_servers import BestOfNServer, ByLength, post
from sotopia_rl import sandbox
from sotopia_rl.episode import Action, AgentSpec
from sotopia_rl.errors import ConfigError, ServingError
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.serve.best_of_n import BestOfN, BestOfNSettings, Policy, candidate_seed
from sotopia_rl.serve.scoring import Batcher, TooLongError
from sotopia_rl.serve.vllm import free_port
from sotopia_rl.simulate import Pairing, SimulateConfig, play, simulate
from tiny_llm import save_model, save_reward_adapter

ASK = {"model": "best-of-n", "messages": [{"role": "user", "content": "Hello?"}]}
CHAT = "/v1/chat/completions"


def speak(words):
    return Action(action_type="speak", argument=words).to_json()


def policy_of(*script):
    """A policy that gives these replies in turn, the last one for ever; a str that is no fault is what it says."""
    return FaultyServer([s if isinstance(s, Answer) or s in FAULTS else reply(s) for s in script])


def served(policy, reward_model=None, **options):
    return BestOfNServer(f"custom/p@{policy.url}", reward_model or ByLength(), **options)


def ask(*script, candidates=None, request=ASK, **options):
    """What the server answers where the policy says these things."""
    with policy_of(*script) as policy, served(policy, candidates=candidates or len(script), **options) as server:
        return server.post(CHAT, request)


def text_of(body):
    return body["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def one_server():
    """For requests that are not supposed to leave a trace."""
    with policy_of(speak("a")) as policy, served(policy, candidates=2, max_request_bytes=1_000_000) as server:
        yield server


def test_the_reply_that_the_reward_model_likes_best_comes_back_unchanged():
    best = '```json\n{"action_type": "speak",  "argument": "Hé!"}\n```'
    status, body, _ = ask(speak("a" * 200), best, speak("b" * 100))
    assert status == 200
    assert text_of(body) == best
    assert body["model"] == "best-of-n"
    assert body["object"] == "chat.completion"


def test_usage_is_what_all_the_candidates_took():
    _, body, _ = ask(speak("a"), speak("bb"), "no JSON")
    assert body["usage"] == {"prompt_tokens": 30, "completion_tokens": 15, "total_tokens": 45}


def test_the_n_best_come_back_in_order_and_all_different():
    _, body, _ = ask(speak("aaa"), speak("a"), speak("aa"), speak("a"), request=ASK | {"n": 2})
    assert [choice["message"]["content"] for choice in body["choices"]] == [speak("a"), speak("aa")]


def test_fewer_valid_replies_than_asked_are_an_error():
    status, body, _ = ask(speak("a"), speak("a"), "x", request=ASK | {"n": 2})
    assert status == 502
    assert body["error"]["code"] == "too_few_valid_candidates"


def test_scores_of_all_candidates_come_on_request():
    _, body, _ = ask(speak("aa"), "no JSON", speak("a"), speak("aa"), request=ASK | {"return_scores": True})
    details = body["best_of_n"]
    assert (details["candidates"], details["valid"]) == (4, 3)
    assert [(r["text"], r["count"]) for r in details["replies"]] == [
        (speak("a"), 1),
        (speak("aa"), 2),
        ("no JSON", 1),
    ]
    assert details["replies"][0]["outputs"] == {"value": details["replies"][0]["score"]}
    assert details["replies"][2]["score"] is None
    assert "no JSON object" in details["replies"][2]["problem"]


def test_equal_replies_are_scored_once():
    model = ByLength()
    with policy_of(*[speak("a")] * 3, speak("b")) as policy, served(policy, model, candidates=4) as server:
        server.post(CHAT, ASK)
    assert model.batches == [2]


@pytest.mark.parametrize(
    "junk", ["Hello!", "", '{"action_type": "shout", "argument": "x"}', '{"action_type": "speak"}']
)
def test_without_a_valid_reply_the_answer_is_an_error_that_says_what_was_wrong(junk):
    status, body, _ = ask(junk, candidates=3)
    assert status == 502
    assert body["error"]["code"] == "no_valid_candidate"
    assert "none of the policy's 3 replies is valid; 3 times: " in body["error"]["message"]
    assert "choices" not in body


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (("Hello!", "", "", "Hello!"), ["2 times: the reply holds no JSON object", "2 times: it is empty"]),
        (("Hello!", "Good day", "Hello!", ""), ["3 times: the reply holds no JSON object", "once: it is empty"]),
        (("Hello!", "", "[1]", '{"action_type": "x"}', '{"argument": 1}', ""), ["2 times: it is empty", "once: "]),
    ],
)
def test_the_counts_of_what_was_wrong_add_up(script, told):
    message = ask(*script)[1]["error"]["message"]
    assert message.startswith(f"none of the policy's {len(script)} replies is valid; ")
    assert [words for words in told if words not in message] == [], message
    counts = [1 if words == "once" else int(words.split()[0]) for words in re.findall(r"; (once|\d+ times): ", message)]
    assert sum(counts) == len(script)


def test_a_prompt_that_is_too_long_for_the_reward_model_is_a_400_and_the_policy_is_not_asked():
    long = ASK | {"messages": [{"role": "user", "content": "x" * 100}]}
    with policy_of(speak("a")) as policy, served(policy, ByLength(max_length=90), candidates=2) as server:
        status, body, _ = server.post(CHAT, long)
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert policy.bodies == []
        assert server.post(CHAT, ASK)[0] == 200


VLLM_TOO_LONG = (
    "This model's maximum context length is 512 tokens. However, your prompt contains at least 513 input tokens, which "
    "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
)
VLLM_MAX_TOKENS = "max_tokens=600 cannot be greater than max_model_len=max_total_tokens=512. Please request fewer"


@pytest.mark.parametrize(
    "refusal",
    [
        {"message": VLLM_TOO_LONG, "type": "BadRequestError", "param": "input_tokens", "code": 400},
        {"message": VLLM_MAX_TOKENS, "type": "BadRequestError", "param": "max_tokens", "code": 400},
        {"message": "Your input is too long.", "type": "invalid_request_error", "code": "context_length_exceeded"},
    ],
)
def test_a_prompt_that_is_too_long_for_the_policy_is_a_400_with_its_words(refusal):
    answer = Answer(400, json.dumps({"error": refusal}).encode())
    status, body, calls = shared(answer, candidates=2, policy_retries=2)
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert refusal["message"][:80] in body["error"]["message"]
    assert "--no-share-prompt" not in body["error"]["message"]
    assert len(calls) == 1


def test_a_reply_that_was_cut_off_is_never_chosen():
    _, body, _ = ask(reply(speak("a"), finish_reason="length"), speak("longer"))
    assert text_of(body) == speak("longer")


def test_without_the_gate_any_whole_text_may_be_chosen():
    _, body, _ = ask("Good morning.", "Hi.", gate="none")
    assert text_of(body) == "Hi."


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("500", 503, "policy_unavailable"),
        ("closed", 503, "policy_unavailable"),
        ("429", 429, "policy_busy"),
        ("401", 502, "policy_refused"),
        ("html", 502, "policy_refused"),
        ("null-content", 502, "policy_refused"),
    ],
)
def test_one_failed_call_fails_the_request_however_good_the_others_are(fault, status, code):
    found, body, headers = ask(speak("a"), speak("b"), fault)
    assert (found, body["error"]["code"]) == (status, code)
    assert body["error"]["message"].startswith("policy: ")
    assert (headers.get("retry-after") is not None) == (status in {429, 503})


def test_a_policy_that_does_not_answer_in_time_is_a_504():
    status, body, _ = ask("hang", policy_timeout_seconds=0.2, candidates=1)
    assert (status, body["error"]["code"]) == (504, "policy_timeout")


def test_a_policy_that_was_down_is_asked_again_once_it_is_back():
    port = free_port("127.0.0.1", 0)
    with BestOfNServer(f"custom/p@http://127.0.0.1:{port}/v1", ByLength(), candidates=4) as server:
        for _ in range(3):  # more failures than the client needs to give an endpoint up
            status, body, headers = server.post(CHAT, ASK)
            assert (status, body["error"]["code"], headers["retry-after"]) == (503, "policy_unavailable", "1")
        assert "cannot connect" in server.get("/healthz")[1]["policy_trouble"]
        assert "sotopia_rl_policy_up 0.0" in server.get("/metrics")[1]
        with FaultyServer([reply(speak("a"))], port=port):
            assert server.post(CHAT, ASK)[0] == 200
        assert server.get("/healthz")[1]["policy_trouble"] is None


class Broken(ByLength):
    """A reward model that fails as told."""

    def __init__(self, trouble):
        super().__init__()
        self.trouble = trouble

    def score(self, pairs):
        if isinstance(self.trouble, Exception):
            raise self.trouble
        return [(self.trouble,)] * len(pairs)


@pytest.mark.parametrize(
    ("trouble", "status", "words"),
    [
        (ServingError("out of memory"), 503, "reward model: out of memory"),
        (float("nan"), 503, "no number"),
        (float("inf"), 503, "no number"),
        (TooLongError("900 tokens of 512"), 400, "900 tokens of 512"),
        (KeyError("secret of the code"), 500, "internal error (KeyError); the server's log says more"),
    ],
)
def test_a_reward_model_that_fails_is_an_error_not_a_choice(trouble, status, words, capfd):
    with policy_of(speak("a"), speak("b")) as policy, served(policy, Broken(trouble), candidates=2) as server:
        found, body, _ = server.post(CHAT, ASK)
    assert found == status
    assert words in body["error"]["message"]
    assert "secret of the code" not in json.dumps(body)


def test_a_streamed_answer_holds_the_same_reply_then_the_usage_then_the_end():
    options = {"stream": True, "stream_options": {"include_usage": True}}
    status, body, headers = ask(speak("a"), speak("bb"), request=ASK | options)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    *events, end = [part.removeprefix("data: ") for part in body.split("\n\n") if part]
    chunks = [json.loads(event) for event in events]
    assert end == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": speak("a")}
    assert chunks[1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 10


def test_an_error_is_no_stream():
    status, body, _ = ask("junk", request=ASK | {"stream": True})
    assert status == 502
    assert body["error"]["code"] == "no_valid_candidate"


def test_what_a_request_asks_reaches_the_policy_and_each_candidate_has_a_seed_of_its_own():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wish = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    request = ASK | {"temperature": 0.3, "top_p": 0.9, "max_tokens": 77, "seed": 5, "response_format": wish}
    with policy_of(speak("a")) as policy, served(policy, candidates=3) as server:
        server.post(CHAT, request)
        server.post(CHAT, request)
        bodies = policy.bodies
    assert {(b["temperature"], b["top_p"], b["max_tokens"]) for b in bodies} == {(0.3, 0.9, 77)}
    assert bodies[0]["messages"] == ASK["messages"]
    assert bodies[0]["response_format"]["json_schema"]["schema"] == schema
    seeds = sorted(b["seed"] for b in bodies)
    assert seeds == sorted(2 * [candidate_seed(5, i) for i in range(3)])
    assert len(set(seeds)) == 3


def test_parts_of_a_text_are_put_together():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    with policy_of(speak("a")) as policy, served(policy, candidates=1) as server:
        assert server.post(CHAT, ASK | {"messages": [{"role": "user", "content": parts}]})[0] == 200
        assert policy.bodies[0]["messages"] == ASK["messages"]


def test_a_greedy_policy_is_asked_once_since_all_its_replies_are_the_same():
    _, body, _ = ask(speak("a"), candidates=10, request=ASK | {"temperature": 0, "return_scores": True})
    assert body["best_of_n"]["candidates"] == 1


def test_a_request_may_ask_for_more_or_fewer_candidates_within_the_limit():
    with policy_of(speak("a")) as policy, served(policy, candidates=2, max_candidates=5) as server:
        server.post(CHAT, ASK | {"best_of": 5})
        assert len(policy.bodies) == 5
        status, body, _ = server.post(CHAT, ASK | {"best_of": 6})
    assert status == 400
    assert "6 candidates are above this server's limit of 5" in body["error"]["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"temperature": 3}, "temperature: "),
        ({"temperature": "0.5"}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"n": 3, "best_of": 2}, "n 3 is above best_of 2"),
        ({"n": 2, "temperature": 0}, "n 2 at temperature 0"),
        ({"n": True}, "n: "),
        ({"tools": []}, "tools: Extra inputs are not permitted"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"seed": 2**70}, "seed: "),
    ],
)
def test_a_wrong_request_is_refused_with_the_place(one_server, change, words):
    status, body, _ = one_server.post(CHAT, ASK | change)
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]


def test_another_model_s_name_is_a_404_that_names_ours(one_server):
    status, body, _ = one_server.post(CHAT, ASK | {"model": "gpt-4o"})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert "'best-of-n'" in body["error"]["message"]


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 200_000,
    b'{"a":' * 100_000,
    json.dumps(ASK).encode() + b"x",
    json.dumps(ASK | {"temperature": float("nan")}).encode(),
    json.dumps(ASK | {"temperature": float("-inf")}).encode(),
    b'{"model": "best-of-n", "messages": [{"role": "user", "content": "\\ud83d"}]}',
    b'{"model": "best-of-n", "messages": [{"role": "user", "content": "x"}], "seed": 1e400}',
    json.dumps(
        ASK
        | {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"x": float("nan"), "y": "\ud83d"}},
            }
        }
    ).encode(),
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
@pytest.mark.parametrize("path", [CHAT, "/v1/score"])
def test_a_body_that_is_no_request_is_a_400_with_a_reason(one_server, path, body):
    status, answer, _ = one_server.post(path, body)
    assert status == 400
    assert answer["error"]["message"]
    assert "Traceback" not in json.dumps(answer)


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_any_bytes_get_a_400(one_server, body):
    assert one_server.post(CHAT, body)[0] == 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_wrong_content_type_is_a_415(one_server, kind):
    status, body, _ = one_server.request("POST", CHAT, json.dumps(ASK).encode(), {"Content-Type": kind})
    assert (status, body["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("size", [1_000_001, 8_000_000])
def test_a_huge_body_is_a_413(one_server, size):
    status, body, _ = one_server.post(CHAT, b"x" * size)
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert one_server.post(CHAT, ASK)[0] == 200


def test_unknown_places_and_methods_are_answered_in_json(one_server):
    assert one_server.get("/v1/nothing")[1]["error"]["code"] == "not_found"
    status, body, headers = one_server.get(CHAT)
    assert (status, body["error"]["code"], headers["allow"]) == (405, "method_not_allowed", "POST")


def test_the_model_is_listed(one_server):
    (card,) = one_server.get("/v1/models")[1]["data"]
    assert card["id"] == "best-of-n"


def test_utterances_are_scored_where_they_are_valid(one_server):
    items = [{"messages": ASK["messages"], "completion": text} for text in (speak("aa"), "no JSON", speak("a"))]
    status, body, _ = one_server.post("/v1/score", {"items": items})
    assert status == 200
    assert [row["index"] for row in body["data"]] == [0, 1, 2]
    assert body["data"][0]["score"] < body["data"][2]["score"]
    assert body["data"][1]["score"] is None
    assert "no JSON object" in body["data"][1]["problem"]


def test_metrics_count_requests_candidates_tokens_and_batches():
    with policy_of(speak("a"), speak("a"), "junk") as policy, served(policy, candidates=3) as server:
        server.post(CHAT, ASK)
        wait_until(lambda: "sotopia_rl_requests_in_progress 0.0" in server.get("/metrics")[1])
        text = server.get("/metrics")[1]
    for line in (
        'sotopia_rl_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'sotopia_rl_candidates_total{kind="valid"} 2.0',
        'sotopia_rl_candidates_total{kind="invalid"} 1.0',
        'sotopia_rl_candidates_total{kind="duplicate"} 1.0',
        'sotopia_rl_policy_tokens_total{kind="completion"} 15.0',
        "sotopia_rl_score_batch_replies_sum 1.0",
        "sotopia_rl_policy_up 1.0",
    ):
        assert line in text


def test_a_key_is_asked_for_where_one_is_set():
    with policy_of(speak("a")) as policy, served(policy, candidates=1, key="hunter2") as server:
        for headers in ({}, {"Authorization": "Bearer hunter3"}, {"Authorization": "hunter2"}):
            status, body, _ = server.post(CHAT, ASK, **headers)
            assert (status, body["error"]["type"]) == (401, "authentication_error")
        assert server.get("/v1/models")[0] == 401
        assert server.post(CHAT, ASK, Authorization="Bearer hunter2")[0] == 200
        assert server.get("/healthz")[0] == 200


def in_threads(count, work):
    results = [None] * count

    def one(index):
        results[index] = work()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_more_requests_than_allowed_are_turned_away_with_a_time_to_come_back():
    with (
        policy_of(*[reply(speak("a"), seconds=0.5)] * 3, speak("a")) as policy,
        served(policy, candidates=1, max_requests=3) as server,
    ):
        results = in_threads(8, lambda: server.post(CHAT, ASK))
        assert server.post(CHAT, ASK)[0] == 200
        line = 'sotopia_rl_requests_total{endpoint="/v1/chat/completions",status="429"} 5.0'
        assert line in server.get("/metrics")[1]
    assert sorted(status for status, _, _ in results) == [200] * 3 + [429] * 5
    for status, body, headers in results:
        assert status == 200 or (headers["retry-after"], body["error"]["type"]) == ("1", "rate_limit_error")


def test_requests_under_way_are_finished_before_the_server_ends():
    with policy_of(speak("a"), reply(speak("a"), seconds=0.5)) as policy, served(policy, candidates=2) as server:
        results = []
        thread = threading.Thread(target=lambda: results.append(server.post(CHAT, ASK)))
        thread.start()
        wait_until(lambda: len(policy.bodies) == 2)
        server.__exit__()
        thread.join()
    assert results[0][0] == 200


def test_the_work_of_a_client_that_leaves_is_dropped():
    slow = reply(speak("a"), seconds=20)
    with policy_of(slow) as policy, served(policy, candidates=2, share_prompt=False) as server:
        thread = threading.Thread(target=lambda: server.send_and_leave(CHAT, ASK, lambda: len(policy.bodies) == 2))
        thread.start()
        thread.join()
        wait_until(lambda: server.get("/healthz")[1]["requests"] == 0)


def wait_until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_sits_in_a_seat_of_a_match_like_any_other_model():
    with BestOfNServer("scripted/fair", ByLength(), candidates=3) as server:
        match = sandbox.matches("train", 1)[0]
        agents = (AgentSpec(model=server.model), AgentSpec(model="scripted/tough"))

        async def run():
            async with ModelPool() as pool:
                models = (pool.get(agents[0].model), pool.get(agents[1].model))
                return await play(Pairing(match, agents), models, tag="t", config=SimulateConfig())

        episode = asyncio.run(run())
    assert episode.status == "completed"
    assert episode.turns[0].usage.completion_tokens >= 0
    assert {turn.attempts for turn in episode.turns} == {1}


def test_a_policy_without_a_valid_reply_fails_its_episode_and_not_the_run():
    """It is the agent that is useless, not the endpoint: no amount of it makes the server count as down."""
    with policy_of("Hello!") as policy, served(policy, candidates=2) as server:
        agents = (AgentSpec(model=server.model), AgentSpec(model="scripted/tough"))
        pairings = [Pairing(match, agents) for match in sandbox.matches("train", 5)]

        async def run():
            limits = ModelLimits(backoff_seconds=0, down_after_seconds=0)
            async with ModelPool(limits) as pool:
                return [e async for e in simulate(pairings, pool.get, tag="t", config=SimulateConfig())]

        episodes = asyncio.run(run())
    assert [(e.status, e.failure.kind) for e in episodes] == [("agent_failed", "bad_reply")] * 5
    assert "none of the policy's 2 replies is valid" in episodes[0].failure.message


def test_a_wrong_policy_string_or_weights_that_do_not_fit_are_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="did you mean scripted/fair"):
        Policy("scripted/fiar", BestOfNSettings().policy_limits())
    for weights in ((1.0, 2.0), (0.0,), (-1.0,)):
        with pytest.raises(ServingError, match="weights"):
            BestOfN(
                Policy("scripted/fair", BestOfNSettings().policy_limits()),
                Batcher(ByLength()),
                BestOfNSettings(weights=weights),
            )


def test_error_bodies_of_the_policy_do_not_become_utterances():
    """The published server passes its error text on as what the agent said."""
    text = json.loads(error(400, "boom").body)["error"]["message"]
    status, body, _ = ask(error(400, "boom"), candidates=1)
    assert status == 502
    assert text in body["error"]["message"]
    assert "choices" not in body


def shared(*script, candidates, request=ASK, requests=1, **options):
    """As `ask`, and the bodies that the policy got."""
    with policy_of(*script) as policy, served(policy, candidates=candidates, **options) as server:
        for _ in range(requests):
            status, body, _ = server.post(CHAT, request)
        return status, body, policy.bodies


DETAILS = ASK | {"return_scores": True, "seed": 5}
CUT_OFF = {"message": {"role": "assistant", "content": speak("")}, "finish_reason": "length"}


def test_all_candidates_come_from_one_call_and_its_usage_is_counted_once():
    status, body, calls = shared(choices(speak("aaa"), speak("a"), speak("aa")), candidates=3, request=DETAILS)
    assert status == 200
    assert text_of(body) == speak("a")
    assert body["best_of_n"]["candidates"] == 3
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 15, "total_tokens": 25}
    assert [(call["n"], call["seed"]) for call in calls] == [(3, candidate_seed(5, 0))]


def test_the_same_seed_sends_the_policy_the_same_request():
    _, _, calls = shared(choices(speak("a"), speak("b")), candidates=2, request=DETAILS, requests=2)
    assert calls[0] == calls[1]
    _, _, calls = shared(choices(speak("a"), speak("b")), candidates=2)
    assert "seed" not in calls[0]


def test_choices_that_are_missing_are_asked_for_singly_and_counted_once():
    script = (choices(speak("aaaa"), speak("aaa")), speak("aa"), speak("a"))
    status, body, calls = shared(*script, candidates=4, request=DETAILS)
    assert status == 200
    assert sorted(r["text"] for r in body["best_of_n"]["replies"]) == sorted(speak("a" * k) for k in (1, 2, 3, 4))
    assert body["usage"] == {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}
    assert [call.get("n") for call in calls] == [4, None, None]
    assert {call["seed"] for call in calls[1:]} == {candidate_seed(5, 2), candidate_seed(5, 3)}


def test_more_choices_than_asked_are_no_candidates():
    _, body, _ = shared(choices(speak("aaa"), speak("aa"), speak("a")), candidates=2, request=DETAILS)
    assert text_of(body) == speak("aa")
    assert body["best_of_n"]["candidates"] == 2


def test_a_policy_that_ignores_n_is_asked_singly_from_then_on(caplog):
    _, body, calls = shared(speak("a"), candidates=3, request=DETAILS, requests=2)
    assert body["best_of_n"]["candidates"] == 3
    assert [call.get("n") for call in calls] == [3] + 5 * [None]
    assert sorted(call["seed"] for call in calls) == sorted(2 * [candidate_seed(5, i) for i in range(3)])
    assert [r.getMessage() for r in caplog.records if "takes no `n`" in r.getMessage()] != []


def test_a_policy_that_refuses_n_is_an_error_that_names_the_flag_which_helps():
    def strict(body):
        return error(400, "Only one completion choice is allowed") if "n" in body else reply(speak("a"))

    with FaultyServer([strict]) as policy, served(policy, candidates=3) as server:
        status, body, _ = server.post(CHAT, ASK)
    assert (status, body["error"]["code"]) == (502, "policy_refused")
    assert "n=3" in body["error"]["message"]
    assert "--no-share-prompt" in body["error"]["message"]
    with FaultyServer([strict]) as policy, served(policy, candidates=3, share_prompt=False) as server:
        assert server.post(CHAT, ASK)[0] == 200
        assert len(policy.bodies) == 3


def test_broken_choices_are_asked_for_again_and_invalid_ones_are_never_chosen():
    script = (choices(speak("aaa"), None, CUT_OFF, "", {"index": 4}, "no JSON"), speak("aa"), speak("aaaa"))
    status, body, calls = shared(*script, candidates=6, request=DETAILS)
    assert status == 200
    assert text_of(body) == speak("aa")
    assert len(calls) == 3
    details = body["best_of_n"]
    assert (details["candidates"], details["valid"]) == (6, 3)
    problems = {r["text"]: r["problem"] for r in details["replies"] if r["problem"]}
    assert problems[speak("")] == "it was cut off at the token limit"
    assert problems[""] == "it is empty"
    assert "no JSON object" in problems["no JSON"]


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ((choices(speak("a"), None), "null-content"), 502, "policy_refused"),
        ((choices(speak("a"), None), "500"), 503, "policy_unavailable"),
        ((choices(None, None),), 502, "policy_refused"),
        ((choices("", CUT_OFF),), 502, "no_valid_candidate"),
        (("500",), 503, "policy_unavailable"),
        (("429",), 429, "policy_busy"),
    ],
)
def test_a_shared_call_or_a_missing_choice_that_fails_fails_the_request(script, status, code):
    found, body, _ = shared(*script, candidates=2)
    assert (found, body["error"]["code"]) == (status, code)
    assert "choices" not in body


def test_a_shared_call_is_tried_again_like_any_other():
    status, body, calls = shared("500", choices(speak("a"), speak("b")), candidates=2, policy_retries=1)
    assert status == 200
    assert body["usage"]["total_tokens"] == 20
    assert [call["n"] for call in calls] == [2, 2]


def test_without_a_shared_prompt_each_candidate_is_a_call_with_a_seed_of_its_own():
    _, _, calls = shared(speak("a"), candidates=3, request=DETAILS, share_prompt=False)
    assert sorted(call["seed"] for call in calls) == sorted(candidate_seed(5, i) for i in range(3))
    assert not any("n" in call for call in calls)


@pytest.mark.slow
def test_the_command_serves_on_uvloop_and_finishes_what_is_under_way_when_it_is_terminated(tmp_path):
    base = save_model(tmp_path / "base")
    adapter = save_reward_adapter(base, tmp_path / "rm", seed=1)
    with policy_of(reply(speak("a"), seconds=1)) as policy:
        command = [sys.executable, "-m", "sotopia_rl.cli", "serve", "best-of-n", "--policy", f"custom/p@{policy.url}"]
        command += ["--reward-model", str(adapter), "-n", "1", "--port", "0"]
        quiet = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=quiet, text=True) as process:
            url = process.stdout.readline().strip().partition("@")[2]
            assert {"uvloop", "httptools"} <= set(re.split(r"\W", Path(f"/proc/{process.pid}/maps").read_text()))
            answers = []
            thread = threading.Thread(target=lambda: answers.append(post(url, CHAT, ASK)))
            thread.start()
            wait_until(lambda: policy.bodies)
            process.terminate()
            thread.join()
    ((status, body, _),) = answers
    assert (status, text_of(body)) == (200, speak("a"))
