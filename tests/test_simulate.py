"""The engine: whose turn it is, when it ends, many matches at once, and a run that is interrupted."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line import call
from faulty_server import FaultyServer, reply
from sotopia_rl import sandbox
from sotopia_rl.episode import ACTION_TYPES, Action, AgentSpec, Usage, sha256_text
from sotopia_rl.errors import BudgetError, EndpointDownError, ModelCallError
from sotopia_rl.llm.structured import UnusableReply
from sotopia_rl.models import Reply
from sotopia_rl.observe import agent_prompt
from sotopia_rl.simulate import Pairing, SimulateConfig, end_reason, episode_id, parse_action, play, simulate, turn_seed
from sotopia_rl.stages import simulate_into
from sotopia_rl.store import EpisodeQuery, open_store

SPEAK = Action(action_type="speak", argument="Hello.")
NONE = Action(action_type="none")
LEAVE = Action(action_type="leave")
OLD = SimulateConfig(count_masked_turns=True)
NEW = SimulateConfig()
MATCHES = sandbox.matches("train", 24)


@dataclass
class Says:
    """A model that does these actions in turn, the last one for ever; an exception is raised."""

    actions: list[Action | Exception]
    name: str = "test/says"
    seconds: float = 0.0
    calls: list[dict] = field(default_factory=list)

    async def complete(self, messages, sampling, *, seed=None, schema=None):
        action = self.actions[min(len(self.calls), len(self.actions) - 1)]
        self.calls.append({"prompt": messages[0].content, "seed": seed, "schema": schema})
        await asyncio.sleep(self.seconds)
        if isinstance(action, Exception):
            raise action
        return Reply(text=action.to_json(), usage=Usage(calls=1, prompt_tokens=10, completion_tokens=2))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        return None


def pairing(number=0, first="test/a", second="test/b"):
    return Pairing(MATCHES[number], (AgentSpec(model=first), AgentSpec(model=second)))


def played(first, second, config=NEW):
    return asyncio.run(play(pairing(), (Says(first), Says(second)), tag="t", config=config))


async def all_of(pairings, get_model, config=NEW):
    return [episode async for episode in simulate(pairings, get_model, tag="t", config=config)]


# One match


def test_the_agents_act_in_turn_the_first_on_even_turns():
    episode = played([SPEAK], [SPEAK], SimulateConfig(max_turns=5))
    assert [turn.seat for turn in episode.turns] == [0, 1, 0, 1, 0]
    assert [turn.index for turn in episode.turns] == [0, 1, 2, 3, 4]


def test_every_prompt_sent_can_be_rendered_again():
    models = Says([SPEAK]), Says([SPEAK, NONE, LEAVE])
    episode = asyncio.run(play(pairing(), models, tag="t", config=NEW))
    for turn in episode.turns:
        prompt = agent_prompt(episode.match, episode.turns[: turn.index], turn.seat, profile=episode.prompt_profile)
        sent = models[turn.seat].calls[turn.index // 2]
        assert sent["prompt"] == prompt
        assert sent["seed"] == turn_seed(episode.match, turn.index)
        assert turn.prompt_sha256 == sha256_text(prompt)


def test_an_episode_ends_when_somebody_leaves():
    episode = played([SPEAK], [SPEAK, LEAVE])
    assert (episode.status, episode.end_reason, len(episode.turns)) == ("completed", "left", 4)


def test_an_episode_ends_at_the_turn_limit():
    episode = played([SPEAK], [SPEAK])
    assert (episode.status, episode.end_reason, len(episode.turns)) == ("completed", "turn_limit", 20)


def test_an_episode_ends_when_more_than_two_in_a_row_do_nothing():
    episode = played([SPEAK, NONE], [NONE])
    assert (episode.end_reason, len(episode.turns)) == ("stale", 4)


def test_by_the_old_rule_one_silence_of_the_second_agent_ends_the_episode():
    episode = played([SPEAK], [SPEAK, NONE], OLD)
    assert (episode.end_reason, len(episode.turns)) == ("stale", 4)


def test_by_the_old_rule_one_silence_of_the_first_agent_never_ends_it():
    episode = played([NONE], [SPEAK], OLD)
    assert (episode.end_reason, len(episode.turns)) == ("turn_limit", 20)


@given(st.lists(st.sampled_from([SPEAK, NONE, LEAVE]), max_size=24))
def test_the_end_is_the_first_of_leaving_silence_and_the_limit(actions):
    reason = end_reason(actions, NEW)
    silent = len(actions) - max((i + 1 for i, a in enumerate(actions) if a != NONE), default=0)
    expected = (
        "left"
        if actions and actions[-1] == LEAVE
        else "stale"
        if silent > 2
        else "turn_limit"
        if len(actions) >= 20
        else None
    )
    assert reason == expected


@given(st.sampled_from(ACTION_TYPES), st.text(min_size=1).filter(str.strip))
def test_an_action_survives_its_canonical_reply_unchanged(kind, argument):
    action = Action(action_type=kind, argument=argument)
    assert parse_action(action.to_json()) == action


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"action_type": "speak"}', "exactly the keys"),
        ('{"action_type": "speak", "argument": "a", "to": "b"}', "exactly the keys"),
        ('{"action_type": "shout", "argument": "a"}', "must be one of none, speak"),
        ('{"action_type": "speak", "argument": 3}', "must be a string"),
        ('{"action_type": "speak", "argument": "  "}', "is empty"),
        ("I would rather not.", "no JSON object"),
    ],
)
def test_a_reply_that_is_no_action_is_refused_with_what_is_wrong(text, problem):
    with pytest.raises(UnusableReply, match=problem):
        parse_action(text)


def test_a_failed_call_ends_the_episode_with_its_turns_so_far():
    episode = played([SPEAK], [SPEAK, ModelCallError("b: HTTP 500", model="b", kind="http_5xx")])
    assert episode.status == "agent_failed"
    assert (episode.failure.kind, episode.failure.turn, episode.failure.message) == ("http_5xx", 3, "b: HTTP 500")
    assert [turn.action for turn in episode.turns] == [SPEAK] * 3
    assert episode.end_reason is None


def test_an_episode_that_takes_too_long_is_timed_out_with_its_turns_so_far():
    models = Says([SPEAK]), Says([SPEAK], seconds=60)
    config = SimulateConfig(episode_timeout_seconds=0.2)
    episode = asyncio.run(play(pairing(), models, tag="t", config=config))
    assert (episode.status, episode.failure.kind, episode.failure.turn) == ("timed_out", "timeout", 1)
    assert len(episode.turns) == 1


def test_an_episode_sums_what_its_turns_took():
    assert played([SPEAK], [LEAVE]).usage == Usage(calls=2, prompt_tokens=20, completion_tokens=4)


# Ids


def test_an_episodes_id_depends_on_what_is_played_and_on_nothing_else():
    one = episode_id(pairing(), tag="t", config=NEW)
    assert one == episode_id(pairing(), tag="t", config=SimulateConfig(concurrency=3, max_attempts=9))
    others = [
        episode_id(pairing(1), tag="t", config=NEW),
        episode_id(pairing(first="test/c"), tag="t", config=NEW),
        episode_id(pairing(first="test/b", second="test/a"), tag="t", config=NEW),
        episode_id(pairing(), tag="u", config=NEW),
        episode_id(pairing(), tag="t", config=OLD),
        episode_id(pairing(), tag="t", config=SimulateConfig(max_turns=3)),
        episode_id(pairing(), tag="t", config=SimulateConfig(prompt_profile="compact")),
    ]
    assert len({one, *others}) == 8


# Many matches


def test_no_more_matches_are_played_at_once_than_asked_for():
    with FaultyServer([lambda _: reply(LEAVE.to_json(), seconds=0.02)]) as server:
        name = f"custom/any@{server.url}"
        episodes = asyncio.run(over_http([pairing(n, name, name) for n in range(12)], SimulateConfig(concurrency=3)))
    assert {episode.status for episode in episodes} == {"completed"}
    assert server.most_at_once == 3


async def over_http(pairings, config):
    from sotopia_rl.llm.open import ModelPool

    async with ModelPool() as pool:
        return await all_of(pairings, pool.get, config)


def test_one_failure_touches_no_other_match():
    bad = ModelCallError("bad: HTTP 400", model="test/bad", kind="http_4xx")
    pairings = [pairing(n, "test/bad" if n == 3 else "test/good", "test/good") for n in range(8)]
    episodes = asyncio.run(all_of(pairings, lambda name: Says([bad if name == "test/bad" else LEAVE])))
    assert [e.status for e in episodes if e.agents[0].model == "test/bad"] == ["agent_failed"]
    assert {e.status for e in episodes if e.agents[0].model == "test/good"} == {"completed"}
    assert len(episodes) == 8


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BudgetError("spent", model="m"), "cancelled"),
        (EndpointDownError("gone", model="m", kind="connection"), "agent_failed"),
    ],
)
def test_a_spent_budget_or_a_dead_endpoint_stops_the_run(error, status):
    yielded = []

    async def run():
        many = [pairing(n) for n in range(20)]
        config = SimulateConfig(concurrency=4)
        async for episode in simulate(many, lambda _: Says([error]), tag="t", config=config):
            yielded.append(episode)  # noqa: PERF401 - the loop raises, and what came before counts

    with pytest.raises(type(error), match=str(error)):
        asyncio.run(run())
    assert 1 <= len(yielded) <= 4
    assert {episode.status for episode in yielded} == {status}


def test_a_run_stops_when_many_episodes_in_a_row_get_no_answer():
    lost = ModelCallError("m: connection lost", model="m", kind="connection")
    config = SimulateConfig(concurrency=1, stop_after_connection_failures=3)
    with pytest.raises(EndpointDownError, match="--retry-failed"):
        asyncio.run(all_of([pairing(n) for n in range(20)], lambda _: Says([lost]), config))


def test_a_resumed_run_plays_what_is_missing_and_retries_the_failed_only_when_told(tmp_path):
    bad = ModelCallError("bad: HTTP 400", model="test/bad", kind="http_4xx")
    pairings = [pairing(n, f"test/{n}", "test/b") for n in range(6)]
    models = {"test/2": Says([bad, LEAVE])}

    def run(some, **options):
        def get(name):
            return models.setdefault(name, Says([LEAVE]))

        return asyncio.run(simulate_into(store, some, get, tag="t", config=NEW, watch=lambda _: None, **options))

    with open_store(tmp_path / "a.db") as store:
        first = run(pairings[:4])
        assert (first.done, first.failed["http_4xx"]) == (4, 1)
        second = run(pairings)
        assert (second.done, second.skipped) == (2, 4)
        third = run(pairings, retry_failed=True)
        assert (third.done, third.skipped) == (1, 5)
        assert store.count(EpisodeQuery(status="completed")) == 6
    assert {name: len(model.calls) for name, model in models.items() if name != "test/b"} == {
        **{f"test/{n}": 1 for n in range(6)},
        "test/2": 2,
    }


# The command, interrupted


def simulation(server, store):
    agent = f"custom/any@{server.url}"
    play_few = ["--manifest", "sandbox-train", "--count", "12", "--agent1", agent, "--agent2", agent, "--tag", "t"]
    settings = ["--store", str(store), "--concurrency", "2", "--max-turns", "4"]
    return ["simulate", *play_few, *settings]


def records(store: Path):
    with open_store(store) as opened:
        return [episode.model_dump() for episode in opened.episodes()]


def deterministic(body):
    """What is said depends on the prompt and nothing else, as with a server that honours seeds."""
    words = sha256_text(body["messages"][0]["content"] + str(body["seed"]))[:12]
    return reply(json.dumps({"action_type": "speak", "argument": words}), seconds=0.005)


def stalling(released, *, after):
    """Answers so many calls, the others once it is released: a command cannot end before it is interrupted."""
    calls = itertools.count(1)

    def answer(body):
        if next(calls) > after:
            released.wait(60)
        return deterministic(body)

    return answer


def interrupted(server, store, how):
    """Start the command, interrupt it when three episodes are stored, and return its exit code and stderr."""
    command = [sys.executable, "-m", "sotopia_rl.cli", *simulation(server, store)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (store.exists() and len(stored_ids(store)) >= 3):
        assert time.monotonic() < deadline, "the command stored nothing"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.kill(process.pid, how)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def stored_ids(store: Path):
    from sotopia_rl.errors import StoreError

    try:
        with open_store(store, create=False) as opened:
            return opened.ids()
    except StoreError:  # being created at this moment
        return []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on_and_ends_with_the_records_of_an_unbroken_one(tmp_path, how):
    released = threading.Event()
    with FaultyServer([stalling(released, after=24)]) as server:
        code, said = interrupted(server, tmp_path / "broken.db", how)
        released.set()
        before = records(tmp_path / "broken.db")
        assert 3 <= len(before) < 12
        assert {episode["status"] for episode in before} == {"completed"}
        if how == signal.SIGINT:
            assert code == 130
            assert said.strip().splitlines()[-1] == "sotopia-rl: stopped; the same command goes on from here"
            assert "Traceback" not in said
        assert call(*simulation(server, tmp_path / "broken.db")) == 0
        assert call(*simulation(server, tmp_path / "whole.db")) == 0
    after = records(tmp_path / "broken.db")
    assert after == records(tmp_path / "whole.db")
    assert len(after) == 12
    assert all(episode in after for episode in before)
