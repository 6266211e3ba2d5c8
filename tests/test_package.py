import contextlib
import functools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import sotopia_rl
from sotopia_rl.cli import COMMANDS, app, main
from sotopia_rl.experiment import load_experiment

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface_hub", "pettingzoo", "redis")
EVERY_YAML = sorted(path for folder in ("recipes", "configs") for path in (ROOT / folder).rglob("*.yaml"))
RECIPES = [path for path in EVERY_YAML if path.is_relative_to(ROOT / "recipes")]


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh process has loaded after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def documentation() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_public_names_are_sorted_and_exist():
    assert list(sotopia_rl.__all__) == sorted(sotopia_rl.__all__)
    assert all(hasattr(sotopia_rl, name) for name in sotopia_rl.__all__)


def test_public_names_are_documented():
    text = documentation()
    missing = [name for name in sotopia_rl.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_the_package_and_the_command_line_load_nothing_heavy():
    loaded = loaded_after("import sotopia_rl, sotopia_rl.cli")
    assert loaded.isdisjoint(HEAVY)


def test_help_loads_nothing_heavy():
    code = "import sotopia_rl.cli\ntry:\n    sotopia_rl.cli.main(['--help'])\nexcept SystemExit:\n    pass"
    assert loaded_after(code).isdisjoint(HEAVY)


def test_importing_what_needs_no_torch_loads_none_configures_no_logging_and_sets_no_environment():
    code = """
import logging, os
before = dict(os.environ)
import sotopia_rl, sotopia_rl.cli, sotopia_rl.evaluate
import sotopia_rl.train.config, sotopia_rl.train.data, sotopia_rl.train.folder, sotopia_rl.train.reward_report
assert dict(os.environ) == before, set(os.environ) ^ set(before)
assert logging.getLogger().handlers == [], logging.getLogger().handlers
"""
    assert loaded_after(code).isdisjoint({"torch", "transformers", "trl"})


def test_nothing_is_mocked():
    banned = re.compile(r"unittest\.mock|from unittest import mock|import mock\b|monkeypatch\.setattr|mocker\b")
    here = Path(__file__)
    found = [p.name for p in here.parent.glob("*.py") if p != here and banned.search(p.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_is_a_valid_experiment(path):
    on_profiles = yaml.safe_load(path.read_text(encoding="utf-8")).get("world", {}).get("source") == "profiles"
    load_experiment(path, overrides={"world": {"profiles": "somewhere"}} if on_profiles else None)


@pytest.mark.parametrize("path", EVERY_YAML, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_file_is_a_mapping(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def shell_lines() -> list[str]:
    """Commands of the shell examples in the documentation, continued lines joined, comments left out."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", documentation(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip().removeprefix("$ ") for line in lines]


@functools.cache
def documented_flags() -> dict[str, set[str]]:
    """Flags used in the documentation, by command."""
    flags: dict[str, set[str]] = {}
    for line in shell_lines():
        if match := re.match(
            r"(?:\S*/)?sotopia-rl ((?:(?:data|episodes|evaluate|manifest|serve) (?=[a-z]))?[a-z]\S*)", line
        ):
            flags.setdefault(match[1], set()).update(re.findall(r"(?<= )--[a-z][\w.-]*", line))
    return flags


def test_documented_commands_exist():
    assert {command.split()[0] for command in documented_flags()} <= set(COMMANDS) | {
        "episodes",
        "data",
        "manifest",
        "serve",
    }


def offered_flags(command: str) -> set[str]:
    called = functools.reduce(lambda group, name: group[name], command.split(), app)
    names = {name for flag in called.assemble_argument_collection() for name in (*flag.names, *flag.negatives)}
    return {name for name in names if name.startswith("--")}


@pytest.mark.parametrize("command", sorted(documented_flags()))
def test_documented_flags_exist(command):
    assert documented_flags()[command] <= offered_flags(command)


@pytest.mark.parametrize("command", ["judge", "serve vllm"])
def test_help_names_every_flag(command, capsys):
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    assert offered_flags(command) <= set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))


def test_documented_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    words = [word for line in shell_lines() if line.startswith("make ") for word in line.split()[1:]]
    assert {word for word in words if re.fullmatch("[a-z-]+", word)} <= targets
    assert {"quickstart", "test", "test-slow", "check", "format", "bench"} <= targets


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    names = {re.split(r"[<>=\[ ;]", line)[0] for line in wanted}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in names} <= pinned
    assert "torch==2.13.0" in pins
    assert not any(pin.startswith(("triton", "nvidia")) or "+" in pin for pin in pins)


def test_links_between_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []
