"""What older systems turned into data, over real HTTP: every fault ends in the right status, nothing is made up.

The faults are those that were seen to become `none` actions, stale episodes and scores of 0.0 in published systems.
"""

import asyncio
import json
import socket

import pytest

from faulty_server import FAULTS, FaultyServer, reply
from sotopia_rl import sandbox
from sotopia_rl.cli import main
from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS
from sotopia_rl.episode import Action, AgentSpec
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.simulate import Pairing, SimulateConfig
from sotopia_rl.stages import judge_into, simulate_into
from sotopia_rl.store import EpisodeQuery, open_store

QUICK = ModelLimits(backoff_seconds=0.001, timeout_seconds=30, max_retries=1, down_after_seconds=60)
HASTY = ModelLimits(timeout_seconds=1, max_retries=0)
"""For the one fault that the deadline ends; a busy machine must meet it otherwise."""
AT_ONCE = ModelLimits(timeout_seconds=0.1, max_retries=0)
"""Where nothing but the hang is waited for."""
HELLO = reply(Action(action_type="speak", argument="Hello.").to_json())
LEAVE = reply(Action(action_type="leave").to_json())
MATCH = sandbox.matches("train", 1)[0]


def watch(_):
    return None


def cast(**scripts):
    """Answers by the model's name: a list each, the last one for ever."""
    calls = dict.fromkeys(scripts, 0)

    def answer(body):
        script, at = scripts[body["model"]], calls[body["model"]]
        calls[body["model"]] += 1
        chosen = script[min(at, len(script) - 1)]
        return FAULTS[chosen] if isinstance(chosen, str) else chosen

    return [answer]


def play(server, store, *, limits=QUICK, config=None):
    """One match between the models `a` and `b` of the server; the stored episode."""
    agents = tuple(AgentSpec(model=f"custom/{name}@{server.url}") for name in "ab")

    async def run():
        async with ModelPool(limits) as pool:
            pairings = [Pairing(MATCH, agents)]
            await simulate_into(store, pairings, pool.get, tag="t", config=config or SimulateConfig(), watch=watch)

    asyncio.run(run())
    (episode,) = store.episodes()
    return episode


def judge(server, store, *, name="j", limits=QUICK):
    async def run():
        async with ModelPool(limits) as pool:
            model = pool.get(f"custom/{name}@{server.url}")
            query = EpisodeQuery(tag="t", status="completed")
            return await judge_into(store, store, query, model, config=JudgeConfig(), limit=4, watch=watch)

    return asyncio.run(run())


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "episodes.db") as opened:
        yield opened


# Agents

UNUSABLE_ACTIONS = {
    "garbage": "%$ 9q }{ no",
    "truncated": '{"action_type": "speak", "argument": "I would',
    "unknown action": '{"action_type": "shout", "argument": "HELLO"}',
    "prose": "I would rather talk about the weather.",
    "null": "null",
    "a list": '[{"action_type": "none", "argument": ""}]',
    "two answers": '{"action_type": "none", "argument": ""} {"action_type": "leave", "argument": ""}',
    "empty": "",
    "unfinished thinking": '<think>{"action_type": "none", "argument": ""}',
    "no argument": '{"action_type": "speak"}',
    "null argument": '{"action_type": "speak", "argument": null}',
}


def assert_failed_at_turn_3(episode, kind, store):
    assert episode.status == "agent_failed"
    assert (episode.failure.kind, episode.failure.turn) == (kind, 3)
    assert [turn.action.argument for turn in episode.turns] == ["Hello."] * 3
    assert episode.end_reason is None
    assert not list(store.ratings())


@pytest.mark.parametrize("text", UNUSABLE_ACTIONS.values(), ids=UNUSABLE_ACTIONS)
def test_an_unusable_reply_of_an_agent_fails_its_episode_and_is_never_silence(store, text):
    with FaultyServer(cast(a=[HELLO], b=[HELLO, reply(text)], j=[LEAVE])) as server:
        episode = play(server, store)
        assert_failed_at_turn_3(episode, "bad_reply", store)
        judged = judge(server, store)
    assert judged.done == 0
    assert not [body for body in server.bodies if body["model"] == "j"]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("400", "http_4xx"),
        ("401", "http_4xx"),
        ("429", "rate_limited"),
        ("500", "http_5xx"),
        ("hang", "timeout"),
        ("closed", "connection"),
        ("half", "connection"),
        ("html", "bad_reply"),
        ("null", "bad_reply"),
        ("null-content", "bad_reply"),
    ],
)
def test_a_failing_server_of_an_agent_fails_its_episode_and_is_never_silence(store, fault, kind):
    with FaultyServer(cast(a=[HELLO], b=[HELLO, fault])) as server:
        assert_failed_at_turn_3(play(server, store, limits=HASTY if fault == "hang" else QUICK), kind, store)


def test_a_hang_beyond_the_episodes_time_is_a_time_out(store):
    patient = ModelLimits(timeout_seconds=60)
    with FaultyServer(cast(a=[HELLO], b=[HELLO, "hang"])) as server:
        episode = play(server, store, limits=patient, config=SimulateConfig(episode_timeout_seconds=1))
    assert (episode.status, episode.failure.kind, len(episode.turns)) == ("timed_out", "timeout", 3)


@pytest.mark.parametrize(
    "wrapped",
    [
        'Here is my action:\n```json\n{"action_type": "speak", "argument": "Hi"}\n```\nI hope it helps.',
        '<think>{"action_type": "leave"}? No.</think>{"action_type": "speak", "argument": "Hi"}',
        "{'action_type': 'speak', 'argument': 'Hi',}",
    ],
)
def test_prose_around_an_action_is_no_failure(store, wrapped):
    with FaultyServer(cast(a=[reply(wrapped)], b=[LEAVE])) as server:
        episode = play(server, store)
    assert episode.status == "completed"
    assert episode.turns[0].action == Action(action_type="speak", argument="Hi")
    assert episode.turns[0].reply == wrapped


def test_a_fault_that_passes_is_asked_again_and_counted(store):
    with FaultyServer(cast(a=[reply("no"), HELLO], b=["500", LEAVE])) as server:
        episode = play(server, store)
    assert episode.status == "completed"
    assert [turn.attempts for turn in episode.turns] == [2, 1]
    assert "cannot be used" in server.bodies[1]["messages"][-1]["content"]


def test_a_dead_endpoint_stops_the_command_with_one_line_and_stores_nothing_as_completed(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        agent = f"custom/any@http://127.0.0.1:{free.getsockname()[1]}/v1"
    matches = ["--manifest", "sandbox-train", "--count", "40", "--tag", "t", "--concurrency", "4"]
    matches += ["--backoff-seconds", "0.001"]
    with pytest.raises(SystemExit) as end:
        main(["simulate", *matches, "--agent1", agent, "--agent2", agent, "--store", str(tmp_path / "e.db")])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1
    assert len(said) == 1
    assert said[0].startswith("sotopia-rl: stopped: ")
    assert "cannot connect" in said[0]
    with open_store(tmp_path / "e.db") as stored:
        assert 1 <= stored.count() <= 4
        assert stored.count(EpisodeQuery(status="completed")) == 0


def test_a_dead_annotator_stops_the_command_which_says_what_was_not_tried(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        annotator = f"custom/any@http://127.0.0.1:{free.getsockname()[1]}/v1"
    where = ["--tag", "t", "--store", str(tmp_path / "e.db")]
    people = ["--agent1", "scripted/fair", "--agent2", "scripted/hasty", "--judge", "scripted/judge"]
    with pytest.raises(SystemExit) as played:
        main(["simulate", "--manifest", "sandbox-train", "--count", "30", *people, *where])
    assert played.value.code == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["annotate", "--annotator", annotator, "--concurrency", "4", "--backoff-seconds", "0.001", *where])
    assert end.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("sotopia-rl: stopped after ")
    assert "of 60 attributions" in last
    assert "cannot connect" in last


# Judges


def scores(**changes):
    values = {d.name: {"reasoning": "why", "score": d.high} for d in SOTOPIA_DIMENSIONS}
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def ratings(first=None, second=None, **more):
    return {"agent_1": first or scores(), "agent_2": second or scores(goal={"reasoning": "why", "score": 1}), **more}


GOOD = json.dumps(ratings())
UNUSABLE_SCORES = {
    "truncated": GOOD[:-30],
    "prose": "Both did well. I would give an 8 to Ann and a 7 to Ben.",
    "null": "null",
    "empty": "",
    "html": "<html>Service temporarily unavailable</html>",
    "out of range": json.dumps(ratings(scores(goal={"reasoning": "why", "score": 11}))),
    "not whole": json.dumps(ratings(scores(goal={"reasoning": "why", "score": 7.5}))),
    "a dimension missing": json.dumps(ratings(scores(goal=None))),
    "one agent only": json.dumps({"agent_1": scores()}),
}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        *((reply(text), "bad_reply") for text in UNUSABLE_SCORES.values()),
        ("400", "http_4xx"),
        ("401", "http_4xx"),
        ("429", "rate_limited"),
        ("500", "http_5xx"),
        ("closed", "connection"),
        ("hang", "timeout"),
    ],
    ids=[*UNUSABLE_SCORES, "400", "401", "429", "500", "closed", "hang"],
)
def test_a_judges_failure_leaves_the_conversation_whole_and_unscored_until_it_is_judged_again(store, answer, kind):
    with FaultyServer(cast(a=[HELLO], b=[LEAVE], j=[answer], good=[reply(GOOD)])) as server:
        played = play(server, store)
        tally = judge(server, store, limits=AT_ONCE if answer == "hang" else QUICK)
        assert dict(tally.failed) == {kind: 1}
        assert list(store.episodes()) == [played]
        assert played.status == "completed"
        assert not list(store.ratings())
        ((stage, item, failure),) = store.failures()
        assert (stage, item, failure.kind) == ("judge", f"{played.id}/custom/j@{server.url}", kind)
        calls = len([body for body in server.bodies if body["model"] in "ab"])
        assert judge(server, store, name="good").done == 1
        assert len([body for body in server.bodies if body["model"] in "ab"]) == calls
    (rating,) = store.ratings()
    assert [rating.points(seat)["goal"] for seat in (0, 1)] == [10, 1]


@pytest.mark.parametrize(
    "text",
    [
        f"Here are my scores:\n```json\n{GOOD}\n```",
        f"<think>Agent 1 gets {{}} here.</think>{GOOD}",
        json.dumps(ratings(summary="Both did well.")),
        json.dumps(dict(reversed(ratings().items()))),
    ],
    ids=["fenced", "thought first", "extra summary", "swapped keys"],
)
def test_a_judges_odd_but_whole_reply_goes_to_the_right_agents(store, text):
    with FaultyServer(cast(a=[HELLO], b=[LEAVE], j=[reply(text)])) as server:
        play(server, store)
        judge(server, store)
    (rating,) = store.ratings()
    assert [rating.points(seat)["goal"] for seat in (0, 1)] == [10, 1]


def test_a_judge_that_failed_is_asked_again_by_the_same_call(store):
    with FaultyServer(cast(a=[HELLO], b=[LEAVE], j=["400", reply(GOOD)])) as server:
        play(server, store)
        assert judge(server, store).failed == {"http_4xx": 1}
        assert judge(server, store).done == 1
    assert len(list(store.ratings())) == 1
    assert not list(store.failures())


# Text


@pytest.mark.parametrize(
    "said",
    [
        "<b>Listen</b> to me & you'll see",
        "I <3 you",
        "In the end he did nothing, and neither did I.",
        "Pick from {action_list} or {{ history }}, {% raw %} as they say",
        "First.\n\nSecond, after a blank line.\n\n\nTurn #7\nThird.",
        'She said: "no" \\ and left the conversation',
        "Élodie → 李雷 😀\u2028end",
    ],
)
def test_an_utterance_reaches_the_partner_and_the_judge_unchanged(store, said):
    spoken = reply(Action(action_type="speak", argument=said).to_json())
    with FaultyServer(cast(a=[spoken], b=[LEAVE], j=[reply(GOOD)])) as server:
        episode = play(server, store)
        judge(server, store)
    name = MATCH.characters[0].name
    to_partner, to_judge = (body["messages"][0]["content"] for body in server.bodies[1:3])
    assert episode.turns[0].action.argument == said
    assert f'Turn #0: {name} said: "{said}"\n' in to_partner
    assert f'Turn #1\n{name} said: "{said}"\n' in to_judge
