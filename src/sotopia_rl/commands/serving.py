"""`serve vllm` and `serve best-of-n`: servers that run until they are stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile
from pydantic import PositiveInt
from rich.markup import escape

from sotopia_rl.commands.flags import Flags, resolve
from sotopia_rl.config import parse_config
from sotopia_rl.console import err, out
from sotopia_rl.errors import ConfigError
from sotopia_rl.serve.best_of_n import BestOfNSettings
from sotopia_rl.serve.vllm_command import VLLMSettings, Watch


def serve_vllm(
    *,
    base: str,
    adapter: list[str] | None = None,
    log: Path | None = None,
    print_: Annotated[bool, Parameter(name="--print", negative="")] = False,
    config: ExistingFile | None = None,
    settings: Flags[VLLMSettings] = VLLMSettings(),  # noqa: B008  frozen
) -> None:
    """Serve a base with LoRA adapters on vLLM until Ctrl-C.

    Parameters
    ----------
    base
        Model folder, or `smollm2`.
    adapter
        NAME=PATH; may be given several times.
    log
        File for vLLM's output; one in the temporary folder by default.
    print_
        Print the command instead of running it.
    config
        YAML file with any of the settings below.
    """
    from sotopia_rl.llm.open import resolve_model_folder
    from sotopia_rl.serve.vllm import VLLMServer
    from sotopia_rl.serve.vllm_command import shell_command, vllm_command, vllm_environment

    (settings,) = resolve(config, settings)
    folder, adapters = resolve_model_folder(base), named_adapters(adapter or [])
    if print_:
        command = vllm_command(folder, adapters, settings)
        out.print(shell_command(command, vllm_environment(settings)), soft_wrap=True, markup=False)
        return
    with suppress(KeyboardInterrupt), terminated_like_ctrl_c(), ExitStack() as stack:
        with starting("vLLM") as watch:
            server = stack.enter_context(VLLMServer(folder, adapters, settings, log=log, watch=watch))
        for name in (None, *adapters):
            out.print(server.model(name), soft_wrap=True, markup=False)
        err.print(f"vLLM answers; its output is in {server.log}; Ctrl-C stops it", soft_wrap=True, markup=False)
        server.wait()


def serve_best_of_n(
    *,
    policy: str,
    reward_model: str,
    n: Annotated[PositiveInt | None, Parameter(name="-n")] = None,
    base: str | None = None,
    config: ExistingFile | None = None,
    settings: Flags[BestOfNSettings] = BestOfNSettings(),  # noqa: B008  frozen
) -> None:
    """Serve the best of N replies of a policy, chosen by a reward model, until Ctrl-C.

    SOTOPIA_RL_SERVER_KEY in the environment is the key that clients must send; without it everybody may ask.

    Parameters
    ----------
    policy
        Model string of the policy.
    reward_model
        Reward adapter as `sotopia-rl rm` writes it, the folder of a sequence classifier, or custom/NAME@URL of a
        vLLM pooling server (`serve vllm --task reward`).
    n
        Replies asked of the policy per request; the same as --candidates.
    base
        Base of the reward adapter (model folder, or `smollm2`), where it is not the one noted beside the adapter;
        needed with a pooling server, for the tokenizer.
    config
        YAML file with any of the settings below.
    """
    from sotopia_rl.serve.run import KEY_VARIABLE, run_best_of_n

    (settings,) = resolve(config, settings)
    if n is not None:
        settings = parse_config(BestOfNSettings, settings.model_dump() | {"candidates": n}, where="-n")

    def ready(name: str) -> None:
        out.print(name, soft_wrap=True, markup=False)
        if settings.host not in {"127.0.0.1", "localhost", "::1"} and not os.environ.get(KEY_VARIABLE):
            err.print(f"everybody who reaches {settings.host} may ask; set {KEY_VARIABLE} to ask for a key")

    with suppress(KeyboardInterrupt):
        run_best_of_n(policy, reward_model, settings, base=Path(base) if base else None, ready=ready)


def named_adapters(texts: list[str]) -> dict[str, Path]:
    """Adapter folders by name, from NAME=PATH.

    Raises:
        ConfigError: A text has no name or no path, or a name stands twice.
    """
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, _, path) in zip(texts, pairs, strict=True) if not (name and path)]:
        raise ConfigError(f"--adapter takes NAME=PATH, for instance --adapter sft=runs/sft/adapter; found {wrong[0]!r}")
    adapters = {name: Path(path) for name, _, path in pairs}
    if len(adapters) < len(pairs):
        raise ConfigError(f"{len(pairs)} adapters with {len(adapters)} different names")
    return adapters


@contextmanager
def starting(what: str) -> Iterator[Watch]:
    """A line that says how long a server has been starting, and what it wrote last; gone once it answers."""
    with err.status(f"starting {what}") as status:

        def watch(seconds: float, line: str) -> None:
            status.update(f"starting {what}, {seconds:.0f} s: {escape(line[: err.width - 40])}")

        yield watch


@contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that what it started ends too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
