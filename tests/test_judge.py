"""The judge: strict about scores, tolerant about wrapping, and never the author of a score."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_rl.config import load_config
from sotopia_rl.episode import (
    Action,
    AgentSpec,
    Character,
    Episode,
    Failure,
    Match,
    Rating,
    Sampling,
    Scenario,
    Score,
    Turn,
    derived_ulid,
    sha256_text,
)
from sotopia_rl.errors import BudgetError, ConfigError, DataError, ModelCallError, ReplyError
from sotopia_rl.judge import (
    SOTOPIA_DIMENSIONS,
    Dimension,
    JudgeConfig,
    judge_all,
    judge_episode,
    judge_schema,
    load_dimensions,
    parse_scores,
)
from sotopia_rl.llm.extract import UnusableReply
from sotopia_rl.models import Reply
from sotopia_rl.observe import judge_prompt

RANGES = {
    "believability": (0, 10),
    "relationship": (-5, 5),
    "knowledge": (0, 10),
    "secret": (-10, 0),
    "social_rules": (-10, 0),
    "financial_and_material_benefits": (-5, 5),
    "goal": (0, 10),
}
FIRST = {name: high for name, (_, high) in RANGES.items()}
SECOND = {name: low for name, (low, _) in RANGES.items()}
AGENT = AgentSpec(model="scripted/fair")


def match():
    people = tuple(Character(id=name, first_name=name, last_name="Lee") for name in ("Ann", "Mary Ann"))
    return Match.of(Scenario(id="s", description="A kitchen.", goals=("Sell", "Buy")), people)


def episode(number=0, **changes):
    turns = (Turn(index=0, seat=0, action=Action(action_type="speak", argument=f"Hi {number}")),)
    fields = {"tag": "t", "match": match(), "agents": (AGENT, AGENT), "prompt_profile": "default", "turns": turns}
    return Episode(id=derived_ulid("e", number), **{"status": "completed", **fields, **changes})


def ours(points):
    return {name: {"reasoning": f"why {name}", "score": score} for name, score in points.items()}


def pairs(points):
    return {name: [f"why {name}", score] for name, score in points.items()}


def good_reply():
    return {"agent_1": ours(FIRST), "agent_2": ours(SECOND)}


GOOD = json.dumps(good_reply())


@dataclass
class Says:
    """A chat model that gives its replies in turn, the last one for ever; an exception is raised."""

    replies: list[str | Exception]
    name: str = "custom/judge@http://127.0.0.1:1/v1"
    calls: list[dict] = field(default_factory=list)

    async def complete(self, messages, sampling, *, seed=None, schema=None):
        reply = self.replies[min(len(self.calls), len(self.replies) - 1)]
        self.calls.append({"messages": messages, "sampling": sampling, "seed": seed, "schema": schema})
        if isinstance(reply, Exception):
            raise reply
        return Reply(text=reply)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        return None


def judged(*replies, config=None):
    return asyncio.run(judge_episode(episode(), Says(list(replies)), config or JudgeConfig()))


async def collected(stream):
    return [item async for item in stream]


# Dimensions


def test_the_seven_dimensions_have_sotopias_names_order_and_ranges():
    assert {d.name: (d.low, d.high) for d in SOTOPIA_DIMENSIONS} == RANGES
    assert [d.name for d in SOTOPIA_DIMENSIONS] == list(RANGES)


def test_custom_dimensions_come_from_a_file_without_code(tmp_path):
    path = tmp_path / "dimensions.yaml"
    path.write_text("dimensions:\n- {name: humour, low: 0, high: 3, description: How funny it was.}\n")
    assert load_dimensions(path) == (Dimension(name="humour", low=0, high=3, description="How funny it was."),)
    model = Says([json.dumps({"agent_1": {"humour": ["dry", 3]}, "agent_2": {"humour": ["none", 0]}})])
    rating = asyncio.run(judge_episode(episode(), model, JudgeConfig(dimensions=path)))
    assert rating.scores == ({"humour": Score(score=3, reason="dry")}, {"humour": Score(score=0, reason="none")})
    prompt = model.calls[0]["messages"][0].content
    assert "How funny it was." in prompt
    assert "believability" not in prompt


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dimensions: []", "dimensions"),
        ("dimension: []", "did you mean 'dimensions'"),
        ("dimensions:\n- {name: a, low: 3, high: 3, description: x}", "low must be below high in 'a'"),
        ("dimensions:\n- {name: a, low: 0.5, high: 3, description: x}", "dimensions.0.low"),
        ("dimensions:\n- {name: a b, low: 0, high: 3, description: x}", "dimensions.0.name"),
        ("dimensions:\n- {name: a, low: 0, high: 3}", "dimensions.0.description"),
        ("dimensions:\n- {name: a, low: 0, high: 3, description: x, hi: 1}", "dimensions.0.hi: unknown key"),
        (
            "dimensions:\n- {name: a, low: 0, high: 3, description: x}\n- {name: a, low: 0, high: 1, description: y}",
            "dimensions named twice: a",
        ),
        ("- a", "expected a mapping"),
        ("dimensions: [", "not YAML"),
    ],
)
def test_a_wrong_file_of_dimensions_is_one_line(tmp_path, text, problem):
    path = tmp_path / "dimensions.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_dimensions(path)
    assert problem in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_schema_constrains_names_ranges_and_agents():
    schema = judge_schema(SOTOPIA_DIMENSIONS, max_reason_chars=200)
    assert schema["required"] == ["agent_1", "agent_2"]
    ratings = schema["$defs"]["Ratings"]
    assert ratings["required"] == list(RANGES)
    secret = ratings["properties"]["secret"]["properties"]
    assert list(secret) == ["reasoning", "score"]
    assert secret["reasoning"] == {"type": "string", "maxLength": 200}
    assert secret["score"] == {"type": "integer", "minimum": -10, "maximum": 0}


# Replies that are taken


ACCEPTED = {
    "ours": GOOD,
    "0.1.4": json.dumps({"agent_1_evaluation": pairs(FIRST), "agent_2_evaluation": pairs(SECOND)}),
    "0.1.5": json.dumps({"evaluations": {"agent_1": pairs(FIRST), "agent_2": pairs(SECOND)}}),
    "agents in swapped order": json.dumps({"agent_2": ours(SECOND), "agent_1": ours(FIRST)}),
    "0.1.5, agents in swapped order": json.dumps({"evaluations": {"agent_2": pairs(SECOND), "agent_1": pairs(FIRST)}}),
    "dimensions in another order": json.dumps(
        {"agent_1": ours(dict(reversed(FIRST.items()))), "agent_2": ours(SECOND)}
    ),
    "an extra summary": json.dumps({"summary": "They met.", **good_reply()}),
    "an extra summary inside": json.dumps(
        {"evaluations": {"summary": "x", "agent_1": pairs(FIRST), "agent_2": pairs(SECOND)}}
    ),
    "an extra dimension": json.dumps(
        {"agent_1": {**ours(FIRST), "overall_score": ["x", 99]}, "agent_2": {**ours(SECOND), "comment": "x"}}
    ),
    "fenced, with a lead-in": f"Here is my evaluation:\n```json\n{GOOD}\n```\nI hope this helps.",
    "thinking first": f"<think>Maybe {{'agent_1': 3}}?</think>{GOOD}",
}


@pytest.mark.parametrize("reply", ACCEPTED.values(), ids=ACCEPTED)
def test_a_complete_reply_is_read_by_its_keys_in_every_form(reply):
    rating = judged(reply)
    assert rating.points(0) == FIRST
    assert rating.points(1) == SECOND
    assert rating.scores[0]["goal"].reason == "why goal"
    assert rating.provenance.attempts == 1
    assert rating.overall(0) == pytest.approx(sum(FIRST.values()) / 7)


# Replies that are refused


def with_goal(value):
    return json.dumps({"agent_1": {**ours(FIRST), "goal": value}, "agent_2": ours(SECOND)})


def without(name):
    return json.dumps({"agent_1": ours(FIRST), "agent_2": ours({k: v for k, v in SECOND.items() if k != name})})


REFUSED = {
    "truncated": (GOOD[:300], "stops in the middle"),
    "prose": ("Both agents did very well.", "no JSON object"),
    "null": ("null", "no JSON object"),
    "empty": ("", "empty"),
    "html": ("<html><body>502 Bad Gateway</body></html>", "no JSON object"),
    "a list": (json.dumps([good_reply()]), "list"),
    "two replies": (f"{GOOD}\n{with_goal(['x', 1])}", "different JSON objects"),
    "an agent twice": (f'{GOOD[:-1]}, "agent_1": {{}}}}', "stands twice"),
    "above the range": (with_goal(["x", 11]), "agent_1: goal: score 11 is outside 0 to 10"),
    "below the range": (with_goal(["x", -1]), "agent_1: goal: score -1 is outside 0 to 10"),
    "half a point": (with_goal(["x", 7.5]), "agent_1: goal: the score must be an integer, found 7.5"),
    "a string": (with_goal(["x", "7"]), "found '7'"),
    "a boolean": (with_goal(["x", True]), "found True"),
    "a null score": (with_goal({"reasoning": "x", "score": None}), "found None"),
    "a bare number": (with_goal(7), "agent_1: goal must hold a reasoning and a score, found 7"),
    "a null entry": (with_goal(None), "found null"),
    "no reasoning": (with_goal({"score": 7}), "must hold a reasoning and a score"),
    "no score": (with_goal({"reasoning": "x"}), "must hold a reasoning and a score"),
    "score first": (with_goal([7, "x"]), "the reasoning must be a string, found 7"),
    "three items": (with_goal(["x", 7, 8]), "found a list"),
    "a missing dimension": (without("secret"), "agent_2: secret is missing"),
    "one agent only": (json.dumps({"agent_1": ours(FIRST)}), "agent_2 is missing"),
    "no agent": ('{"summary": "fine"}', "agent_1 is missing"),
    "three agents": (json.dumps({**good_reply(), "agent_3": ours(FIRST)}), "agent_3"),
    "agents by name": (json.dumps({"Ann Lee": ours(FIRST), "Mary Ann Lee": ours(SECOND)}), "agent_1 is missing"),
    "two forms at once": (json.dumps({**good_reply(), "agent_1_evaluation": pairs(FIRST)}), "more than once"),
    "evaluations beside agents": (
        json.dumps({**good_reply(), "evaluations": {"agent_1": pairs(FIRST), "agent_2": pairs(SECOND)}}),
        "agent_1 is rated more than once",
    ),
    "evaluations in a list": (json.dumps({"evaluations": [pairs(FIRST), pairs(SECOND)]}), "evaluations must be"),
    "an agent's ratings in a list": (json.dumps({"agent_1": [1], "agent_2": ours(SECOND)}), "found a list"),
}


@pytest.mark.parametrize(("reply", "problem"), REFUSED.values(), ids=REFUSED)
def test_an_unusable_reply_is_refused_with_what_is_wrong(reply, problem):
    with pytest.raises(UnusableReply) as refusal:
        parse_scores(reply, SOTOPIA_DIMENSIONS)
    assert problem in str(refusal.value)


@pytest.mark.parametrize("reply", [reply for reply, _ in REFUSED.values()], ids=REFUSED)
def test_an_unusable_reply_is_asked_again_and_gives_no_score_when_it_stays_so(reply):
    assert judged(reply, GOOD).provenance.attempts == 2
    with pytest.raises(ReplyError) as error:
        judged(reply)
    assert error.value.replies == (reply,) * 3


def test_the_model_is_told_everything_that_was_wrong():
    bad = {"agent_1": {**ours(FIRST), "goal": ["x", 12]}, "agent_2": {"goal": ["x", 7.5]}}
    model = Says([json.dumps(bad), GOOD])
    asyncio.run(judge_episode(episode(), model, JudgeConfig()))
    told = model.calls[1]["messages"][-1].content
    assert "agent_1: goal: score 12 is outside 0 to 10" in told
    assert "agent_2: goal: the score must be an integer, found 7.5" in told
    for name in set(RANGES) - {"goal"}:
        assert f"agent_2: {name} is missing" in told


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["score", "reasoning", "x"]), inner),
    max_leaves=6,
)


@given(entry=json_values)
def test_whatever_stands_in_a_score_it_is_in_range_or_refused(entry):
    try:
        scores = parse_scores(with_goal(entry), SOTOPIA_DIMENSIONS)
    except UnusableReply:
        return
    assert 0 <= scores[0]["goal"].score <= 10
    assert scores[0]["goal"].score == int(scores[0]["goal"].score)


@given(st.data())
def test_scores_and_reasons_survive_every_form(data):
    reasons = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    points = [
        {name: (data.draw(reasons), data.draw(st.integers(low, high))) for name, (low, high) in RANGES.items()}
        for _ in (1, 2)
    ]
    named = [{name: {"reasoning": r, "score": s} for name, (r, s) in agent.items()} for agent in points]
    for reply in (
        {"agent_1": named[0], "agent_2": named[1]},
        {"agent_1_evaluation": points[0], "agent_2_evaluation": points[1]},
        {"evaluations": {"agent_2": points[1], "agent_1": named[0]}},
    ):
        scores = parse_scores(json.dumps(reply), SOTOPIA_DIMENSIONS)
        assert [{name: (s.reason, s.score) for name, s in agent.items()} for agent in scores] == points


# Asking


def test_the_judge_gets_one_message_its_sampling_and_the_schema():
    model = Says([GOOD])
    config = JudgeConfig(max_tokens=900, seed=5)
    rating = asyncio.run(judge_episode(episode(), model, config))
    (call,) = model.calls
    (message,) = call["messages"]
    assert message.role == "user"
    assert message.content == judge_prompt(match(), episode().turns)
    assert call["sampling"] == Sampling(temperature=0.0, max_tokens=900)
    assert call["seed"] == 5
    assert call["schema"] == judge_schema(SOTOPIA_DIMENSIONS)
    assert rating.judge == rating.provenance.model == model.name
    assert rating.provenance.prompt_profile == "default"
    assert rating.provenance.prompt_sha256 == sha256_text(message.content)


def test_a_published_profile_sends_its_own_prompt_without_a_schema():
    model = Says([ACCEPTED["0.1.4"]])
    asyncio.run(judge_episode(episode(), model, JudgeConfig(prompt_profile="sotopia-0.1.4")))
    assert model.calls[0]["messages"][0].content == judge_prompt(match(), episode().turns, profile="sotopia-0.1.4")
    assert model.calls[0]["schema"] is None


@pytest.mark.parametrize("status", ["agent_failed", "timed_out", "cancelled"])
def test_a_conversation_that_did_not_end_is_not_judged(status):
    broken = episode(status=status, failure=Failure(kind="timeout", message="x", turn=1))
    model = Says([GOOD])
    with pytest.raises(DataError, match=f"status is {status}.* simulate it again"):
        asyncio.run(judge_episode(broken, model, JudgeConfig()))
    assert model.calls == []


def test_an_episode_whose_judging_failed_can_be_judged_again():
    failed = episode(status="judge_failed", failure=Failure(kind="bad_reply", message="x"))
    assert asyncio.run(judge_episode(failed, Says([GOOD]), JudgeConfig())).points(0) == FIRST


def test_an_unknown_profile_is_a_config_error(tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text("prompt_profile: papers\n")
    with pytest.raises(ConfigError, match="'papers'; choose one of"):
        load_config(JudgeConfig, path)


def test_the_configs_key_follows_what_the_dimension_file_says(tmp_path):
    path, twin = tmp_path / "a.yaml", tmp_path / "b.yaml"
    text = "dimensions:\n- {name: humour, low: 0, high: 3, description: How funny it was.}\n"
    path.write_text(text)
    twin.write_text(text)
    key = JudgeConfig(dimensions=path).key()
    assert key == JudgeConfig(dimensions=twin, concurrency=2).key()
    path.write_text(text.replace("funny", "dry"))
    assert JudgeConfig(dimensions=path).key() != key


# Many episodes


CALL_FAILURES = [
    ModelCallError("HTTP 400", model="m", kind="http_4xx"),
    ModelCallError("HTTP 500", model="m", kind="http_5xx"),
    ModelCallError("HTTP 429", model="m", kind="rate_limited"),
    ModelCallError("no reply in 60 s", model="m", kind="timeout"),
    ModelCallError("connection closed", model="m", kind="connection"),
]


@pytest.mark.parametrize("failure", CALL_FAILURES, ids=lambda e: e.kind)
def test_a_failed_call_is_the_failure_of_its_episode_and_of_no_other(failure):
    model = Says([GOOD, failure, GOOD, "no JSON", "no JSON", "no JSON", GOOD])
    results = asyncio.run(collected(judge_all(map(episode, range(5)), model, JudgeConfig(), limit=1)))
    assert [e.id for e, _ in results] == [episode(n).id for n in range(5)]
    assert [type(r) for _, r in results] == [Rating, Failure, Rating, Failure, Rating]
    assert [r.kind for _, r in results if isinstance(r, Failure)] == [failure.kind, "bad_reply"]
    assert all(r.episode_id == e.id for e, r in results if isinstance(r, Rating))


def test_a_reached_spend_cap_starts_no_further_episode():
    model = Says([GOOD, BudgetError("spent", model="m")])
    results = asyncio.run(collected(judge_all(map(episode, range(9)), model, JudgeConfig(), limit=1)))
    assert [type(r) for _, r in results] == [Rating, Failure]


def test_several_judges_rate_the_same_episodes_apart():
    episodes = [episode(n) for n in range(3)]
    judges = [Says([GOOD], name="openai/a"), Says([GOOD], name="openai/b")]
    ratings = [
        rating for judge in judges for _, rating in asyncio.run(collected(judge_all(episodes, judge, JudgeConfig())))
    ]
    assert len({(r.episode_id, r.judge) for r in ratings}) == 6


def test_an_unfinished_conversation_among_many_is_the_callers_mistake():
    broken = episode(1, status="agent_failed", failure=Failure(kind="timeout", message="x", turn=1))
    with pytest.raises(DataError, match=broken.id):
        asyncio.run(collected(judge_all([episode(), broken], Says([GOOD]), JudgeConfig())))


def test_the_documented_file_of_dimensions_loads(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "prompts.md"
    example = page.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "my.yaml"
    path.write_text(example)
    assert [d.name for d in load_dimensions(path)] == ["humour"]
