"""vLLM as a process: the command, what is refused before it starts, how its end is told, adapters over HTTP."""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from real_vllm import needs_smollm2, needs_vllm, on_cpu
from sotopia_rl.cli import main
from sotopia_rl.episode import Sampling
from sotopia_rl.errors import ConfigError, ModelCallError, ServingError
from sotopia_rl.llm import smollm2
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import open_model
from sotopia_rl.models import Message
from sotopia_rl.serve.vllm import VLLMServer, check_vllm, free_port, last_errors, load_adapter, unload_adapter
from sotopia_rl.serve.vllm_command import VLLMSettings, adapter_rank, reward_outputs, vllm_command
from tiny_llm import save_adapter, save_model, save_reward_adapter

ROOT = Path(__file__).parents[1]
ANY_PORT = VLLMSettings(port=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base = save_model(root / "base")
    save_adapter(base, root / "sft", seed=1)
    save_adapter(base, root / "grpo", seed=2)
    save_reward_adapter(base, root / "rm", seed=4, outputs=3)
    save_adapter(save_model(root / "other", seed=9), root / "stranger", seed=3)
    return root


@pytest.fixture
def stand_in(monkeypatch):
    """What a program in place of vLLM is to do."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "stand_in_vllm"))
    monkeypatch.setenv("STAND_IN", "serves")
    return lambda what: monkeypatch.setenv("STAND_IN", what)


def option(command, name):
    return command[command.index(name) + 1]


def test_the_command_names_every_adapter_and_room_for_all_of_them(folders):
    adapters = {name: folders / name for name in ("sft", "grpo")}
    command = vllm_command(folders / "base", adapters, VLLMSettings(max_loras=1))
    at = command.index("--lora-modules")
    assert command[at + 1 : at + 3] == [f"sft={folders / 'sft'}", f"grpo={folders / 'grpo'}"]
    assert option(command, "--max-cpu-loras") == "2"
    assert option(command, "--max-lora-rank") == "16"
    assert option(command, "--served-model-name") == "base"


def with_template(adapter, folder, template):
    shutil.copytree(adapter, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_adapters_bring_the_chat_template_they_were_trained_with(folders, tmp_path):
    base, plain = folders / "base", folders / "sft"
    one, same = (with_template(plain, tmp_path / name, "{{ messages }}") for name in ("one", "same"))
    command = vllm_command(base, {"plain": plain, "one": one, "same": same}, VLLMSettings())
    assert option(command, "--chat-template") == str((one / "chat_template.jinja").resolve())
    assert "--chat-template" not in vllm_command(base, {"plain": plain}, VLLMSettings())
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ messages[0] }}")
    other = with_template(plain, tmp_path / "other", "{{ messages[0] }}")
    with pytest.raises(ConfigError, match="adapters one and other were trained with different chat templates"):
        vllm_command(base, {"one": one, "same": same, "other": other}, VLLMSettings())
    command = vllm_command(base, {"one": one, "other": other}, VLLMSettings(chat_template=mine))
    assert option(command, "--chat-template") == str(mine)


def test_a_base_s_own_sampling_defaults_are_switched_off(folders):
    assert option(vllm_command(folders / "base", {}, VLLMSettings()), "--generation-config") == "vllm"


def test_a_reward_server_gets_as_many_outputs_as_the_adapter_has(folders):
    base, reward_adapter = folders / "base", folders / "rm"
    settings = VLLMSettings(task="reward")
    command = vllm_command(base, {"rm": reward_adapter}, settings)
    assert reward_outputs(reward_adapter) == 3
    assert json.loads(option(command, "--hf-overrides")) == {"num_labels": 3}
    assert json.loads(option(command, "--pooler-config"))["use_activation"] is False


def test_a_policy_is_no_reward_model_and_the_other_way_round(folders):
    base, sft_adapter, reward_adapter = folders / "base", folders / "sft", folders / "rm"
    with pytest.raises(ConfigError, match="not for scoring"):
        vllm_command(base, {"a": sft_adapter}, VLLMSettings(task="reward"))
    with pytest.raises(ConfigError, match="not for text generation"):
        vllm_command(base, {"a": reward_adapter}, VLLMSettings())


@pytest.mark.parametrize(
    ("adapters", "settings", "words"),
    [
        ({"a": "stranger"}, {}, "was trained on .*other, not on .*base"),
        ({"a": "nowhere"}, {}, "no such folder"),
        ({"a": "base"}, {}, "no adapter_config.json"),
        ({"base": "sft"}, {}, "the base's name 'base'"),
        ({"a b": "sft"}, {}, "adapter name 'a b'"),
        ({}, {"chat_template": "nowhere.jinja"}, "no such file"),
    ],
)
def test_what_vllm_would_refuse_after_minutes_is_refused_at_once(folders, adapters, settings, words):
    with pytest.raises(ConfigError, match=words):
        VLLMServer(
            folders / "base", {n: folders / p for n, p in adapters.items()}, VLLMSettings.model_validate(settings)
        )


def test_a_base_that_is_none_is_named_as_it_was_given(folders, tmp_path):
    wrong = {tmp_path: "not a model folder", tmp_path / "no": "no such folder", folders / "sft": "its base is"}
    for base, words in wrong.items():
        with pytest.raises(ConfigError, match=f"^{base}: .*{words}"):
            vllm_command(base, {}, VLLMSettings())


def test_a_rank_above_the_limit_is_refused_with_both_numbers(folders, tmp_path):
    config = json.loads((folders / "sft" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 16, "rank_pattern": {"q_proj": 64}}))
    assert adapter_rank(tmp_path) == 64
    with pytest.raises(ConfigError, match="rank 64, above max_lora_rank 32"):
        vllm_command(folders / "base", {"wide": tmp_path}, VLLMSettings(max_lora_rank=32))
    command = vllm_command(folders / "base", {"wide": tmp_path}, VLLMSettings())
    assert option(command, "--max-lora-rank") == "64"


def test_an_interpreter_without_vllm_is_named_with_what_to_install():
    with pytest.raises(ServingError, match=r"has no vLLM; install it .*--python"):
        check_vllm(Path(sys.executable))
    with pytest.raises(ServingError, match="cannot be run"):
        check_vllm(Path("/nowhere/python"))


def test_a_port_that_is_taken_is_found_before_vllm_loads():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(ServingError, match="Address already in use"):
            free_port("127.0.0.1", holder.getsockname()[1])


def test_a_server_answers_inside_the_block_and_is_gone_after_it(folders, stand_in):
    with VLLMServer(folders / "base", {"sft": folders / "sft"}, ANY_PORT) as server:
        assert server.model("sft") == f"custom/sft@{server.url}"
        assert server.model() == f"custom/base@{server.url}"
        assert known(server) == {"sft": str(folders / "sft")}
        process = server._process.pid
    assert not server.log.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def known(server):
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/adapters") as answer:  # noqa: S310
        return json.load(answer)


def test_adapters_come_and_go_while_it_runs(folders, stand_in):
    with VLLMServer(folders / "base", {"sft": folders / "sft"}, ANY_PORT) as server:
        server.load_adapter("grpo", folders / "grpo")
        assert known(server)["grpo"] == str(folders / "grpo")
        server.load_adapter("text", str(folders / "grpo"))
        load_adapter(server.url, "text", str(folders / "sft"))
        assert known(server)["text"] == str(folders / "sft")
        server.unload_adapter("text")
        server.unload_adapter("grpo")
        with pytest.raises(ServingError, match="HTTP 404: The lora adapter cannot be found"):
            unload_adapter(server.url, "grpo")
        with pytest.raises(ConfigError, match="was trained on"):
            server.load_adapter("stranger", folders / "stranger")
        assert set(known(server)) == {"sft"}


def test_the_key_of_the_environment_is_asked_and_sent_and_on_no_command_line(folders, stand_in, monkeypatch):
    port = free_port("127.0.0.1", 0)
    variable = f"SOTOPIA_RL_KEY_127_0_0_1_{port}"
    monkeypatch.setenv(variable, "hunter2")
    with VLLMServer(folders / "base", {}, VLLMSettings(port=port)) as server:
        assert "hunter2" not in Path(f"/proc/{server._process.pid}/cmdline").read_text()
        server.load_adapter("sft", folders / "sft")
        monkeypatch.delenv(variable)
        with pytest.raises(ServingError, match="HTTP 401"):
            load_adapter(server.url, "sft", folders / "sft")


def test_a_death_while_starting_is_told_with_the_server_s_last_lines(folders, stand_in):
    stand_in("dies")
    server = VLLMServer(folders / "base", {}, ANY_PORT)
    with pytest.raises(ServingError, match=r"died while starting \(exit code 3\)") as caught, server:
        pass
    assert "ValueError: not enough memory for the cache" in str(caught.value)
    server.log.unlink()


CAUSE = "RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 kv_cache_idx=0"
WORKER, CORE, API = (f"({name} pid=3{i}) " for i, name in enumerate(("Worker", "EngineCore", "APIServer")))
DIED_OF_ITS_FIRST_REQUEST = f"""
{API}WARNING 11-23 07:53:31 [system_utils.py:255] This can cause fd limit errors like `OSError: [Errno 24] Too many`
{WORKER}ERROR 11-23 07:56:33 [multiproc_executor.py:1063] Traceback (most recent call last):
{WORKER}ERROR 11-23 07:56:33 [multiproc_executor.py:1063]     return self._op(*args, **kwargs)
{WORKER}ERROR 11-23 07:56:33 [multiproc_executor.py:1063] {CAUSE}
{WORKER}ERROR 11-23 07:56:33 [multiproc_executor.py:1063] Traceback (most recent call last):
{WORKER}ERROR 11-23 07:56:33 [multiproc_executor.py:1063] {CAUSE}
{CORE}ERROR 11-23 07:56:33 [core.py:1512]     raise RuntimeError(
{CORE}ERROR 11-23 07:56:33 [core.py:1512] RuntimeError: Worker failed with error
{API}ERROR 11-23 07:56:33 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.
INFO:     127.0.0.1:44010 - "POST /v1/chat/completions HTTP/1.1" 500 Internal Server Error
nanobind: leaked 514 functions!
 - leaked function "get_int1"
 - ... skipped remainder
nanobind: this is likely caused by a reference counting issue in the binding code.
See https://nanobind.readthedocs.io/en/latest/refleaks.html
/lib/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore
  warnings.warn('resource_tracker: There appear to be %d '
"""
REFUSED_ITS_OPTIONS = f"""
{API}pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
{API}  Value error, The checkpoint you are trying to load has model type `qwen9` [type=value_error]
{API}    For further information visit https://errors.pydantic.dev/2.14/v/value_error
{API}    and so on
"""


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (
            DIED_OF_ITS_FIRST_REQUEST,
            [
                CAUSE,
                "RuntimeError: Worker failed with error",
                "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
            ],
        ),
        (REFUSED_ITS_OPTIONS, [line.removeprefix(API) for line in REFUSED_ITS_OPTIONS.strip().split("\n")[:3]]),
        ("api_server.py: error: unrecognized arguments: --foo\n", []),
    ],
)
def test_the_errors_of_a_log_are_found_between_tracebacks_and_noise(log, told):
    assert last_errors(log.split("\n")) == told


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("0", f"its last errors:\n  {CAUSE}\n"),
        ("-9", "the end of it:\n  loading weights\n"),
    ],
)
def test_a_death_is_told_with_its_cause_and_without_noise(folders, stand_in, monkeypatch, status, told):
    stand_in("dies")
    monkeypatch.setenv("STAND_IN_LOG", DIED_OF_ITS_FIRST_REQUEST)
    monkeypatch.setenv("STAND_IN_STATUS", status)
    server = VLLMServer(folders / "base", {}, ANY_PORT)
    with pytest.raises(ServingError, match="died while starting") as caught, server:
        pass
    assert f"(exit code {status})" in str(caught.value)
    assert told in str(caught.value)
    assert not any(noise in str(caught.value) for noise in ("nanobind", "leaked", "resource_tracker"))
    server.log.unlink()


OWNER = """
import sys, time
from sotopia_rl.serve.vllm import VLLMServer
from sotopia_rl.serve.vllm_command import VLLMSettings
server = VLLMServer(sys.argv[1], settings=VLLMSettings(port=0)).__enter__()
print(server.url, flush=True)
time.sleep(60)
"""


def test_vllm_does_not_survive_the_sudden_end_of_the_process_that_started_it(folders, stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], *sys.path]))
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(folders / "base")], stdout=subprocess.PIPE, text=True)
    port = int(owner.stdout.readline().split(":")[2].removesuffix("/v1\n"))
    with pytest.raises(ServingError, match="cannot be listened on"):
        free_port("127.0.0.1", port)
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 20
    while not is_free(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_free(port):
    with contextlib.suppress(ServingError):
        return bool(free_port("127.0.0.1", port))


def test_a_server_that_never_answers_is_ended(folders, stand_in, tmp_path):
    stand_in("hangs")
    seen = []
    settings = VLLMSettings(port=0, start_timeout_seconds=2)
    server = VLLMServer(folders / "base", {}, settings, log=tmp_path / "v.log", watch=lambda *what: seen.append(what))
    with pytest.raises(ServingError, match="did not answer within 2 s"), server:
        pass
    assert seen[-1][1] == "ValueError: not enough memory for the cache"


def test_a_death_during_the_run_is_told_at_its_end(folders, stand_in, tmp_path):
    server = VLLMServer(folders / "base", {}, ANY_PORT, log=tmp_path / "v.log").__enter__()
    server._process.kill()
    server._process.wait()
    with pytest.raises(ServingError, match=r"died \(exit code -9\)"):
        server.__exit__(None)


def test_the_command_is_printed_as_one_would_type_it(folders, capsys):
    with contextlib.suppress(SystemExit):
        main(["serve", "vllm", "--base", str(folders / "base"), "--adapter", f"sft={folders / 'sft'}", "--print"])
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    assert words[-2:] == ["--lora-modules", f"sft={folders / 'sft'}"]


@pytest.mark.parametrize("text", ["sft", "=path", "sft="])
def test_an_adapter_without_a_name_or_a_path_is_refused(folders, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["serve", "vllm", "--base", str(folders / "base"), "--adapter", text])
    assert caught.value.code == 2
    assert "--adapter takes NAME=PATH" in capsys.readouterr().err


CPU = on_cpu(chunked_prefill=False)


@pytest.mark.slow
@needs_vllm
@needs_smollm2
def test_the_real_vllm_serves_adapters_that_come_and_go_and_says_what_a_process_here_says(tmp_path, monkeypatch):
    """Greedy replies of base and adapters equal transformers' own; a seed repeats a sampled one; a kill is told."""
    base = smollm2.cached()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    for seed, name in enumerate(("one", "two")):
        save_adapter(base, tmp_path / name, seed=seed)
    server = VLLMServer(base, {"one": tmp_path / "one"}, CPU, log=tmp_path / "vllm.log").__enter__()
    try:
        assert said(server.model()) == said(f"local/{base}")
        assert said(server.model("one")) == said(f"local/{base}:{tmp_path / 'one'}")
        server.load_adapter("two", tmp_path / "two")
        assert said(server.model("two")) == said(f"local/{base}:{tmp_path / 'two'}")
        server.load_adapter("one", tmp_path / "two")
        assert said(server.model("one")) == said(server.model("two"))
        server.unload_adapter("two")
        with pytest.raises(ModelCallError, match="404"):
            said(server.model("two"))
        assert said(server.model(), temperature=1, seed=5) == said(server.model(), temperature=1, seed=5)
        server._process.kill()
        server._process.wait()
        with pytest.raises(ServingError, match="died"):
            server.__exit__(None)
    finally:
        server.stop()


def said(model, *, temperature=0.0, seed=None):
    async def run():
        async with open_model(model, ModelLimits(max_retries=0)) as opened:
            sampling = Sampling(temperature=temperature, max_tokens=12)
            prompt = "Name three colours of the rainbow. " * 40  # long enough to be prefilled in chunks
            return await opened.complete([Message(role="user", content=prompt)], sampling, seed=seed)

    return asyncio.run(run()).text
