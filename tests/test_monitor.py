"""What the judge says of a policy while it trains."""

import asyncio
from pathlib import Path

import pytest

from sotopia_rl import sandbox
from sotopia_rl.dataset import PromptRow
from sotopia_rl.episode import Action, AgentSpec, Sampling
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.limits import Budget, ModelLimits
from sotopia_rl.models import Message
from sotopia_rl.monitor import Monitor, secret_leaks, validation_pairings
from sotopia_rl.sandbox import SCRIPTED
from sotopia_rl.simulate import Pairing, SimulateConfig, play
from sotopia_rl.store import open_store

MATCHES = sandbox.matches("train", 6, seed=3)
PARTNERS = [AgentSpec(model="scripted/fair"), AgentSpec(model="scripted/tough")]


def looked_at(episodes: Path, policy: str, *, judge: str = "scripted/judge") -> dict[str, float]:
    monitor = Monitor(
        matches=MATCHES,
        partners=PARTNERS,
        judge=judge,
        sampling=Sampling(),
        simulate=SimulateConfig(max_turns=8),
        judging=JudgeConfig(),
        limits=ModelLimits(),
        budget=Budget(),
    )
    return asyncio.run(monitor.look(SCRIPTED[policy](), episodes))


def test_the_partners_take_turns_and_the_policy_sits_where_the_match_says():
    system = AgentSpec(model="scripted/hasty")
    pairings = validation_pairings(MATCHES, system, PARTNERS)
    assert [pairing.agents[pairing.match.seat] for pairing in pairings] == [system] * 6
    assert [pairing.agents[1 - pairing.match.seat] for pairing in pairings] == PARTNERS * 3


def test_a_good_policy_is_told_from_a_bad_one_and_its_score_is_its_goal(tmp_path: Path):
    fair, hasty = (looked_at(tmp_path / "v.db", name) for name in ("fair", "hasty"))
    assert fair["score"] == fair["goal"] > hasty["score"]
    assert fair["judge_failed"] == 0
    assert {"overall", "believability", "words_per_utterance", "secret_leaks"} <= fair.keys()


def test_a_second_look_at_the_same_step_plays_nothing_again(tmp_path: Path):
    first = looked_at(tmp_path / "v.db", "fair")
    with open_store(tmp_path / "v.db") as store:
        before = list(store.episodes())
    assert looked_at(tmp_path / "v.db", "fair") == first
    with open_store(tmp_path / "v.db") as store:
        assert list(store.episodes()) == before
    assert len(before) == len(MATCHES)


def test_where_nothing_can_be_judged_there_is_no_score_but_the_share_that_failed(tmp_path: Path):
    assert looked_at(tmp_path / "v.db", "fair", judge="scripted/rude") == {"judge_failed": 1.0}


@pytest.fixture
def store_and_row(tmp_path: Path):
    """A stored talk about a secret, and the row of the keeper's first turn after the other's."""
    match = sandbox.matches("train", 1, families=["secret"])[0]
    agents = (AgentSpec(model="scripted/fair"), AgentSpec(model="scripted/fair"))
    models = (SCRIPTED["fair"](), SCRIPTED["fair"]())
    episode = asyncio.run(play(Pairing(match, agents), models, tag="t", config=SimulateConfig()))
    sides = sandbox.sides(match)
    seat = 0 if sides[0].role == "keeper" else 1
    with open_store(tmp_path / "s.db") as store:
        store.add_episode(episode)
        prompt = (Message(role="user", content="..."),)
        scenario = match.scenario.id
        yield store, PromptRow(prompt=prompt, episode_id=episode.id, scenario_id=scenario, turn=seat, seat=seat), sides


def test_telling_ones_secret_is_a_leak_and_asking_is_not(store_and_row):
    store, row, sides = store_and_row
    leaks = secret_leaks([store])
    kept = sides[row.seat].kept
    assert leaks(row, Action(action_type="speak", argument=f"It is {kept}.").to_json())
    assert not leaks(row, Action(action_type="speak", argument="That is private.").to_json())
    assert not leaks(row, Action(action_type="leave", argument="").to_json())


def test_a_reply_that_is_no_action_gives_nothing_away(store_and_row):
    store, row, sides = store_and_row
    assert not secret_leaks([store])(row, f"It is {sides[row.seat].kept}.")


def test_validation_matches_share_no_scenario_with_those_trained_on():
    train, validation = sandbox.apart_matches("train", 200, 20, seed=1)
    assert train == sandbox.matches("train", 200, seed=1)
    assert len(validation) == 20
    assert not {m.scenario.id for m in train} & {m.scenario.id for m in validation}
