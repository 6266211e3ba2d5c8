"""Model strings: four forms, everything else refused in one line that says what to write."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_rl.errors import ConfigError
from sotopia_rl.llm import smollm2
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import (
    CustomName,
    LocalName,
    ModelPool,
    OpenAIName,
    ScriptedName,
    VLLMName,
    open_model,
    parse_name,
)
from sotopia_rl.llm.prices import price_of


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("openai/gpt-4o", OpenAIName("gpt-4o")),
        ("openai/ft:gpt-4o:me::1", OpenAIName("ft:gpt-4o:me::1")),
        ("custom/a@http://localhost:8000/v1", CustomName("a", "http://localhost:8000/v1")),
        ("custom/Qwen/Qwen2.5-7B@https://h/v1/", CustomName("Qwen/Qwen2.5-7B", "https://h/v1")),
        ("custom/a@b@http://h/v1", CustomName("a@b", "http://h/v1")),
        ("local/models/base", LocalName(Path("models/base"), None)),
        ("local//abs/base:runs/sft", LocalName(Path("/abs/base"), Path("runs/sft"))),
        ("vllm//abs/base:runs/sft", VLLMName(Path("/abs/base"), Path("runs/sft"))),
        ("local/smollm2", LocalName(Path("smollm2"), None)),
        ("scripted/fair", ScriptedName("fair")),
    ],
)
def test_a_model_string_is_read(text, parsed):
    assert parse_name(text) == parsed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "openai/NAME"),
        ("gpt-4o", "openai/NAME"),
        ("openai/", "openai/NAME"),
        (" openai/gpt-4o", "openai/NAME"),
        ("openia/gpt-4o", "did you mean openai/gpt-4o"),
        ("anthropic/claude", "custom/NAME@"),
        ("custom/a", "custom/NAME@http"),
        ("custom/a@localhost:8000", "custom/NAME@http"),
        ("custom/@http://h/v1", "custom/NAME@http"),
    ],
)
def test_anything_else_is_refused_with_the_forms(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_name(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["custom/a@http://me:hunter2@h/v1", "custom/a@http://h/v1?key=hunter2"])
def test_a_key_in_a_url_is_refused_and_not_repeated(text):
    with pytest.raises(ConfigError) as caught:
        parse_name(text)
    assert "hunter2" not in str(caught.value)
    assert "environment" in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_model_string_or_a_config_error(text):
    try:
        parse_name(text)
    except ConfigError as error:
        message = str(error)
    else:
        message = text
    assert message


@pytest.mark.parametrize("url", ["http://h:99999/v1", "http:///v1", "http://[::1/v1"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="is not a URL"):
        ModelPool().get(f"custom/a@{url}")


def test_a_scripted_model_s_near_name_is_suggested():
    with pytest.raises(ConfigError) as caught:
        ModelPool().get("scripted/fiar")
    assert "did you mean scripted/fair?" in str(caught.value)


def test_a_scripted_model_opens():
    async def run():
        async with open_model("scripted/fair") as model:
            return model.name

    assert asyncio.run(run()) == "scripted/fair"


def test_a_pool_opens_each_string_once():
    pool = ModelPool()
    assert pool.get("scripted/fair") is pool.get("scripted/fair")


def test_prices_go_from_exact_to_pattern_to_list():
    own = {"custom/a@http://h/v1": (1.0, 2.0), "custom/*": (0.0, 0.0)}
    assert price_of("custom/a@http://h/v1", own).cost(1_000_000, 1_000_000) == 3.0
    assert price_of("custom/b@http://h/v1", own).cost(10, 10) == 0.0
    assert price_of("openai/gpt-4o", own).prompt == 2.5
    assert price_of("openai/gpt-4o-2024-05-13", {}).prompt == 5
    assert price_of("openai/gpt-4o-2024-08-06", {}).prompt == 2.5
    assert price_of("openai/gpt-4o-audio-preview", {}) is None
    assert price_of("custom/x@http://h/v1", {}) is None


def test_importing_the_opener_brings_in_neither_torch_nor_aiohttp():
    code = "import sys, sotopia_rl.llm.open; print({'torch', 'transformers', 'aiohttp'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_torn_smollm2_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SOTOPIA_RL_CACHE", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights"):
        ModelPool(ModelLimits()).get("local/smollm2")
