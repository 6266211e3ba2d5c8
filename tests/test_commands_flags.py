"""Flags and config files of every command: what they set, and one line where they are wrong."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from command_line import call
from sotopia_rl.attribute import AttributionConfig
from sotopia_rl.cli import COMMANDS, app
from sotopia_rl.commands.data import Asking
from sotopia_rl.commands.flags import resolve, unchecked
from sotopia_rl.commands.options import Drawn, Speaking
from sotopia_rl.dataset import CloningFilter
from sotopia_rl.errors import ConfigError
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.reward import RewardConfig
from sotopia_rl.simulate import SimulateConfig
from sotopia_rl.store import open_store
from store_samples import episode

GROUPS = {
    "evaluate": ("play", "rejudge", "compare", "matrix", "bundle", "verify"),
    "episodes": ("list", "show", "export", "import", "delete"),
    "manifest": ("list", "freeze", "show"),
    "data": ("pull",),
    "serve": ("best-of-n", "vllm"),
}
EVERY = [(c,) for c in COMMANDS if c not in GROUPS] + [(g, c) for g, commands in GROUPS.items() for c in commands]
UNBOUNDED = {"--seed", "--judging.seed", "--cloning.goal-above"}
"""Numbers below 0 that mean something; `run` and `quickstart` refuse them in their own words."""
SIMULATE = ["simulate", "--manifest", "sandbox-train", "--agent1", "scripted/fair", "--agent2", "scripted/fair"]


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refuses(annotation: object, value: str) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return True
    return False


def test_every_command_is_looked_at() -> None:
    named = {(name,) for name in app if not name.startswith("-")}
    groups = {(g, c) for (g,) in named for c in app[g] if g in GROUPS and not c.startswith("-")}
    assert {n for n in named if n[0] not in GROUPS} | groups == set(EVERY)


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_numbers_out_of_range_are_one_line_with_their_flags(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, needed, arguments = written(tmp_path, ""), [], app[command[0]]
    for name in command[1:]:
        arguments = arguments[name]
    found = arguments.assemble_argument_collection()
    for argument in (a for a in found if a.required):
        value = tmp_path if "file_okay=False" in str(argument.field_info.annotation) else file
        needed += [value] if argument.field_info.is_positional else [argument.name, value]
    numbers = [a for a in found if not a.children and a.hint in {int, float, int | None, float | None}]
    bounded = [a for a in numbers if a.name not in UNBOUNDED]
    settings = [[a.name, "0" if refuses(a.field_info.annotation, "0") else "-9"] for a in bounded if a.keys]
    plain = [[a.name, "-1"] for a in bounded if not a.keys]
    for flags in [*plain, list(chain(*settings))]:
        if flags:
            assert call(*command, *needed, *flags) == 2
            said = capsys.readouterr().err
            assert said.startswith("sotopia-rl: ")
            assert said.count("\n") == 1
            assert [flag for flag in flags[::2] if f"{flag}: " not in said] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-turns", "0"], "--max-turns: Input should be greater than 0 (found '0')"),
        (["--temperature", "-1"], "--temperature: Input should be greater than or equal to 0 (found '-1')"),
        (["--max-turns", "2.5"], "--max-turns: Input should be a valid integer, unable to parse string as an integer"),
        (["--count", "0", "--max-retries", "-3"], "(found '0'); --max-retries: Input should be greater than or equal"),
        (["--device", "tpu"], "--device: Input should be 'auto', 'cpu' or 'cuda' (found 'tpu')"),
        (["--prices", '{"a_b": [1]}'], "--prices.a_b.1: Field required"),
        (["--prices", "{a"], "--prices: not JSON (Expecting property name enclosed in double quotes)"),
        (["--tag", ""], "--tag: String should have at least 1 character (found '')"),
        (["--frobnicate"], "--frobnicate: no such flag\n"),
        (["--max-turn=3"], "--max-turn: no such flag, did you mean --max-turns?\n"),
        ([], "--tag requires an argument"),
        (["extra"], "extra"),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    tag = [] if not flags or "--tag" in flags else ["--tag", "t"]
    assert call(*SIMULATE, *tag, *flags) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.startswith("sotopia-rl: ")
    assert shown.count("\n") == 1


def test_the_file_sets_whatever_the_flags_below_config_set(tmp_path: Path) -> None:
    text = "count: 2\ntemperature: 0.25\nmax_tokens: 99\nmax_turns: 4\nmax_retries: 2\nmax_spend_usd: 1\n"
    file = written(tmp_path, text + 'prices: {"custom/A_b*@http://gpu1:*": [0, 0.5]}\n')
    store = tmp_path / "e.db"
    assert call(*SIMULATE, "--tag", "t", "--store", store, "--config", file, "--max-tokens", 50) == 0
    with open_store(store, create=False) as opened:
        episodes = list(opened.episodes())
    assert len(episodes) == 2
    sampling = episodes[0].agents[0].sampling
    assert (sampling.temperature, sampling.max_tokens, episodes[0].max_turns) == (0.25, 50, 4)
    limits = resolve(file, Drawn(), Speaking(), SimulateConfig(), ModelLimits())[-1]
    assert (limits.max_retries, limits.prices) == (2, {"custom/A_b*@http://gpu1:*": (0, 0.5)})


def test_an_unknown_key_is_compared_with_all_settings(tmp_path: Path) -> None:
    file = written(tmp_path, "max_retrie: 2\nmax_turn: 3\ntemperatur: 1\nwhatever: 1\n")
    with pytest.raises(ConfigError) as error:
        resolve(file, Speaking(), SimulateConfig(), ModelLimits())
    said = str(error.value).replace(f"{file}: ", "").split("; ")
    assert said == [
        "max_retrie: unknown key, did you mean 'max_retries'?",
        "max_turn: unknown key, did you mean 'max_turns'?",
        "temperatur: unknown key, did you mean 'temperature'?",
        "whatever: unknown key",
    ]


def test_a_section_of_the_file_has_its_own_settings(tmp_path: Path) -> None:
    sections = {CloningFilter: "cloning"}
    file = written(tmp_path, "clip_low: 1\ncloning: {goal_above: 5}\n")
    flags = unchecked(CloningFilter, {"best_per_scenario": "2"})
    rewards, cloning = resolve(file, RewardConfig(), flags, sections=sections)
    assert (rewards.clip_low, cloning) == (1, CloningFilter(goal_above=5, best_per_scenario=2))
    for text, said in {
        "cloning: {goal: 5, best_per_scenario: 0}": "cloning.best_per_scenario: Input should be greater than or equal",
        "cloning: 3": "cloning: expected a mapping of settings, found int",
        "goal_above: 3": "goal_above: unknown key",
    }.items():
        with pytest.raises(ConfigError, match=said):
            resolve(written(tmp_path, text), RewardConfig(), CloningFilter(), sections=sections)


def test_file_and_flags_are_checked_together(tmp_path: Path) -> None:
    file = written(tmp_path, "temperature: 1\nconcurrency: 3\n")
    flags = unchecked(AttributionConfig, {"samples": "5"})
    asking, settings = resolve(file, Asking(), flags)
    assert (asking.concurrency, settings.samples, settings.temperature) == (3, 5, 1)
    with pytest.raises(ConfigError, match=r"^5 samples at temperature 0 are all the same; set a temperature$"):
        resolve(None, Asking(), flags)


@pytest.mark.parametrize(("number", "buffering"), [(1, ""), (400, ""), (1, "1")])
def test_a_reader_that_leaves_ends_the_command_quietly(number: int, buffering: str, tmp_path: Path) -> None:
    store = tmp_path / "e.db"
    with open_store(store) as opened:
        opened.add_episodes([episode(n) for n in range(number)])
    command = [sys.executable, "-m", "sotopia_rl.cli", "episodes", "list", "--store", str(store)]
    environment = {**os.environ, "PYTHONUNBUFFERED": buffering}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == 141
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


@pytest.mark.parametrize("word", ["none", "null"])
def test_a_setting_that_may_be_absent_is_switched_off_by_name(tmp_path: Path, word: str) -> None:
    file = written(tmp_path, "max_spend_usd: 5")
    (limits,) = resolve(file, unchecked(ModelLimits, {"max_spend_usd": word}))
    assert limits.max_spend_usd is None
    with pytest.raises(ConfigError, match="--max-retries"):
        resolve(None, unchecked(ModelLimits, {"max_retries": word}))
