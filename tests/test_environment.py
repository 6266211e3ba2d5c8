import asyncio
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pettingzoo", reason="pip install 'sotopia-rl[pettingzoo]'")

from pettingzoo.test import api_test, parallel_api_test, seed_test

from sotopia_rl import sandbox
from sotopia_rl.environment import AGENTS, SotopiaAECEnv, SotopiaParallelEnv, read_action
from sotopia_rl.episode import ACTION_TYPES, Action, AgentSpec, Sampling
from sotopia_rl.models import Message
from sotopia_rl.simulate import Pairing, SimulateConfig, parse_action, play, turn_seed

MATCHES = sandbox.matches("train", 6)
SPEAK = {"action_type": ACTION_TYPES.index("speak"), "argument": "Hello <b>there</b> {x}\n\nYou?"}
SILENT = {"action_type": "none", "argument": ""}
LEAVE = Action(action_type="leave")

# PettingZoo's tests expect arrays to look at and boxes to act in; ours are texts, and they say so each time.
texts_are_not_arrays = [
    pytest.mark.filterwarnings("ignore:Observation is not a NumPy array"),
    pytest.mark.filterwarnings("ignore:Observation space for each agent probably should be"),
    pytest.mark.filterwarnings("ignore:Action space for each agent probably should be"),
]


def with_marks(test):
    for mark in texts_are_not_arrays:
        test = mark(test)
    return test


@with_marks
def test_the_aec_environment_passes_pettingzoos_api_test():
    api_test(SotopiaAECEnv(MATCHES), num_cycles=200)


@with_marks
def test_the_parallel_environment_passes_pettingzoos_api_test():
    parallel_api_test(SotopiaParallelEnv(MATCHES), num_cycles=200)


@with_marks
def test_the_same_seed_gives_the_same_episode():
    seed_test(lambda: SotopiaAECEnv(MATCHES), num_cycles=50)


def test_agents_that_answer_the_observed_prompt_make_the_engines_episode():
    match, config = MATCHES[0], SimulateConfig()
    models = (sandbox.SCRIPTED["fair"](), sandbox.SCRIPTED["talkative"]())
    specs = (AgentSpec(model=models[0].name), AgentSpec(model=models[1].name))
    episode = asyncio.run(play(Pairing(match=match, agents=specs), models, tag="t", config=config))

    def reply(seat, prompt, turn):
        message = Message(role="user", content=prompt)
        return asyncio.run(models[seat].complete([message], Sampling(), seed=turn_seed(match, turn))).text

    aec = SotopiaAECEnv(MATCHES, config=config)
    aec.reset(options={"match": match.id})
    for agent in aec.agent_iter():
        observation, _, terminated, truncated, _ = aec.last()
        over = terminated or truncated
        aec.step(None if over else parse_action(reply(AGENTS.index(agent), observation["text"], observation["turn"])))

    parallel = SotopiaParallelEnv(MATCHES, config=config)
    observations, infos = parallel.reset(options={"match": match.id})
    while parallel.agents:
        agent = next(a for a, o in observations.items() if o["action_mask"].all())
        observed = observations[agent]
        action = parse_action(reply(AGENTS.index(agent), observed["text"], observed["turn"]))
        observations, _, _, _, infos = parallel.step({agent: action})

    expected = [(t.seat, t.action, t.prompt_sha256) for t in episode.turns]
    assert len(expected) > 1
    for environment in (aec, parallel):
        turns = environment.conversation.turns
        assert [(t.seat, t.action, t.prompt_sha256) for t in turns] == expected
        assert environment.conversation.end_reason == episode.end_reason
    assert infos[AGENTS[0]] == {"match": match.id, "end_reason": episode.end_reason}


def test_who_waits_may_only_do_nothing():
    environment = SotopiaParallelEnv(MATCHES)
    observations, _ = environment.reset(seed=1)
    assert observations["agent_0"]["action_mask"].tolist() == [1, 1, 1, 1, 1]
    assert observations["agent_1"]["action_mask"].tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="agent_1 waits at turn 0"):
        environment.step({"agent_0": SPEAK, "agent_1": SPEAK})
    assert environment.conversation.turns == ()
    observations, *_ = environment.step({"agent_0": SPEAK, "agent_1": SILENT})
    assert observations["agent_1"]["action_mask"].all()
    assert SPEAK["argument"] in observations["agent_1"]["text"]


def test_leaving_terminates_and_the_turn_limit_truncates():
    environment = SotopiaParallelEnv(MATCHES, config=SimulateConfig(max_turns=3))
    environment.reset(seed=1)
    environment.step({"agent_0": SPEAK})
    _, _, terminated, truncated, infos = environment.step({"agent_1": LEAVE})
    assert (terminated["agent_0"], truncated["agent_0"], infos["agent_0"]["end_reason"]) == (True, False, "left")
    assert environment.agents == []
    environment.reset()
    for agent in ("agent_0", "agent_1", "agent_0"):
        _, _, terminated, truncated, infos = environment.step({agent: SPEAK})
    assert (terminated["agent_1"], truncated["agent_1"], infos["agent_1"]["end_reason"]) == (False, True, "turn_limit")


@pytest.mark.parametrize(("masked", "silent_turns"), [(False, 3), (True, 2)])
def test_silence_ends_the_episode_by_either_rule(masked, silent_turns):
    environment = SotopiaAECEnv(MATCHES, config=SimulateConfig(count_masked_turns=masked))
    environment.reset(seed=1)
    played = 0
    while not any(environment.terminations.values()):
        environment.step(SILENT)
        played += 1
    assert (played, environment.conversation.end_reason) == (silent_turns, "stale")


def test_the_reward_function_sees_the_finished_conversation_once():
    seen = []

    def reward(match, turns):
        seen.append((match, turns))
        return 0.25, -1.0

    environment = SotopiaAECEnv(MATCHES, reward=reward)
    environment.reset(seed=1)
    environment.step(SPEAK)
    assert environment.rewards == {"agent_0": 0.0, "agent_1": 0.0}
    environment.step(LEAVE)
    assert environment.rewards == {"agent_0": 0.25, "agent_1": -1.0}
    assert seen == [(environment.conversation.match, environment.conversation.turns)]
    assert environment.render().endswith("left the conversation")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"action_type": 5, "argument": ""}, "not an index"),
        ({"action_type": "shout", "argument": "Hey"}, "action_type must be one of"),
        ({"action_type": "speak", "argument": ""}, "argument of speak is empty"),
        ({"action_type": "speak"}, "exactly the keys"),
        (Action(action_type="speak"), "argument of speak is empty"),
    ],
)
def test_a_malformed_action_is_refused_and_changes_nothing(action, message):
    environment = SotopiaAECEnv(MATCHES)
    environment.reset(seed=1)
    with pytest.raises(ValueError, match=message):
        environment.step(action)
    assert environment.conversation.turns == ()


def test_missing_actions_unknown_matches_and_steps_after_the_end_are_refused():
    environment = SotopiaParallelEnv(MATCHES)
    with pytest.raises(ValueError, match=r"call reset\(\)"):
        environment.step({})
    with pytest.raises(ValueError, match="no match has the id"):
        environment.reset(options={"match": "nowhere"})
    environment.reset()
    with pytest.raises(ValueError, match="agent_0 acts at turn 0, and gave no action"):
        environment.step({"agent_1": SILENT})
    with pytest.raises(ValueError, match="at least one match"):
        SotopiaAECEnv([])


@given(kind=st.sampled_from(ACTION_TYPES), argument=st.text(min_size=1).filter(str.strip))
@settings(max_examples=50)
def test_an_action_reads_the_same_by_number_and_by_name(kind, argument):
    expected = Action(action_type=kind, argument=argument)
    number = np.int64(ACTION_TYPES.index(kind))
    assert read_action({"action_type": number, "argument": argument}) == expected
    assert read_action({"action_type": kind, "argument": argument}) == expected == read_action(expected)


def test_the_documented_example_runs():
    page = Path(__file__).parents[1] / "docs" / "sotopia-data.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("left the conversation")
