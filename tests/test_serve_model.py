"""`vllm/PATH[:ADAPTER]`: one server per base for as long as the run lasts, whatever adapters turn up."""

import asyncio
import os
from pathlib import Path

import pytest

from sotopia_rl import sandbox
from sotopia_rl.episode import AgentSpec, Sampling
from sotopia_rl.errors import ConfigError, EndpointDownError, ServingError
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.models import Message, gives_many
from sotopia_rl.simulate import Pairing, SimulateConfig, parse_action, play
from tiny_llm import save_adapter, save_model

LIMITS = ModelLimits(max_retries=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base = save_model(root / "base")
    for seed, name in enumerate(("sft", "grpo")):
        save_adapter(base, root / name, seed=seed)
    save_adapter(save_model(root / "other", seed=9), root / "stranger", seed=3)
    return root


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "stand_in_vllm"))
    monkeypatch.setenv("STAND_IN", "serves")


async def said(pool, name):
    reply = await pool.get(name).complete([Message(role="user", content="Hello?")], Sampling())
    return parse_action(reply.text).argument


def test_base_and_adapters_share_a_server_that_ends_with_the_run(folders, stand_in):
    base = folders / "base"

    async def run():
        async with ModelPool(LIMITS) as pool:
            first = await asyncio.gather(said(pool, f"vllm/{base}:{folders / 'sft'}"), said(pool, f"vllm/{base}"))
            server = pool.get(f"vllm/{base}").base._server
            late = await said(pool, f"vllm/{base}:{folders / 'grpo'}")
            assert pool.get(f"vllm/{base}:{folders / 'grpo'}").base._server is server
            assert pool.tallies()[f"vllm/{base}"].calls == 1
            return [*first, late], server._process.pid

    replies, process = asyncio.run(run())
    assert replies == [str(folders / "sft"), "base", str(folders / "grpo")]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_many_replies_come_from_one_call(folders, stand_in):
    async def run():
        async with ModelPool(LIMITS) as pool:
            model = pool.get(f"vllm/{folders / 'base'}")
            assert gives_many(model)
            replies = await model.complete_many([Message(role="user", content="Hello?")], Sampling(), 3)
            return replies, model.tally.calls

    replies, calls = asyncio.run(run())
    assert [parse_action(reply.text).argument for reply in replies] == ["base"] * 3
    assert calls == 1


def test_an_adapter_plays_a_match_by_its_folder_alone(folders, stand_in):
    name = f"vllm/{folders / 'base'}:{folders / 'sft'}"
    agents = (AgentSpec(model=name), AgentSpec(model="scripted/fair"))

    async def run():
        async with ModelPool(LIMITS) as pool:
            models = (pool.get(name), pool.get("scripted/fair"))
            config = SimulateConfig(max_turns=4)
            return await play(Pairing(sandbox.matches("train", 1)[0], agents), models, tag="t", config=config)

    episode = asyncio.run(run())
    assert episode.status == "completed"
    assert episode.agents[0].model == name


def test_what_does_not_fit_is_refused_before_anything_is_started(folders, stand_in, monkeypatch):
    with pytest.raises(ConfigError, match="was trained on"):
        ModelPool().get(f"vllm/{folders / 'base'}:{folders / 'stranger'}")
    with pytest.raises(ConfigError, match="no such folder"):
        ModelPool().get(f"vllm/{folders / 'nowhere'}")
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(ServingError, match="has no vLLM"):
        ModelPool().get(f"vllm/{folders / 'base'}")


def test_settings_come_from_a_file_and_wrong_ones_are_named(folders, stand_in, tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("python: /nowhere/python\n")
    with pytest.raises(ServingError, match="/nowhere/python: cannot be run"):
        ModelPool(ModelLimits(vllm=file)).get(f"vllm/{folders / 'base'}")
    file.write_text("max_lora: 3\n")
    with pytest.raises(ConfigError, match="did you mean 'max_loras'"):
        ModelPool(ModelLimits(vllm=file)).get(f"vllm/{folders / 'base'}")


def test_a_server_that_does_not_start_fails_every_call_and_is_started_once(folders, stand_in, monkeypatch):
    monkeypatch.setenv("STAND_IN", "dies")

    async def run():
        async with ModelPool(LIMITS) as pool:
            calls = [said(pool, f"vllm/{folders / 'base'}") for _ in range(3)]
            return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(run())
    assert {type(error) for error in errors} == {ServingError}
    assert len({str(error) for error in errors}) == 1
    assert "not enough memory for the cache" in str(errors[0])


def test_a_server_that_dies_stops_the_run_with_its_last_lines(folders, stand_in):
    async def run():
        async with ModelPool(LIMITS) as pool:
            name = f"vllm/{folders / 'base'}"
            await said(pool, name)
            process = pool.get(name).base._server._process
            process.kill()
            process.wait()
            await said(pool, name)

    with pytest.raises(EndpointDownError, match=r"(?s)vLLM died \(exit code -9\).*not enough memory"):
        asyncio.run(run())
