"""`serve vllm` and `serve best-of-n`: servers that run until they are stopped."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile
from rich.markup import escape

from sotopia_rl.commands.options import resolve
from sotopia_rl.console import err, out
from sotopia_rl.errors import ConfigError
from sotopia_rl.serve.vllm_command import VLLMSettings, Watch


def serve_vllm(
    *,
    base: str,
    adapter: list[str] | None = None,
    python: Path | None = None,
    log: Path | None = None,
    print_: Annotated[bool, Parameter(name="--print", negative="")] = False,
    config: ExistingFile | None = None,
    settings: Annotated[VLLMSettings, Parameter(name="*")] = VLLMSettings(),  # noqa: B008  frozen
) -> None:
    """Serve a base with LoRA adapters on vLLM until Ctrl-C.

    Parameters
    ----------
    base
        Model folder, or `smollm2`.
    adapter
        NAME=PATH; may be given several times.
    python
        Interpreter of the environment that vLLM is installed in; this one by default.
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

    chosen = resolve(settings, config)
    folder, adapters = resolve_model_folder(base), named_adapters(adapter or [])
    if print_:
        command = vllm_command(folder, adapters, chosen, python or Path(sys.executable))
        out.print(shell_command(command, vllm_environment(chosen)), soft_wrap=True, markup=False)
        return
    with suppress(KeyboardInterrupt), terminated_like_ctrl_c(), ExitStack() as stack:
        with starting("vLLM") as watch:
            server = stack.enter_context(VLLMServer(folder, adapters, chosen, python=python, log=log, watch=watch))
        for name in (None, *adapters):
            out.print(server.model(name), soft_wrap=True, markup=False)
        err.print(f"vLLM answers; its output is in {server.log}; Ctrl-C stops it", soft_wrap=True, markup=False)
        server.wait()


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
