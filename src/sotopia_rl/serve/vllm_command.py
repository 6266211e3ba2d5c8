"""The command that serves a base with LoRA adapters on vLLM, and what can be found wrong before it is run.

vLLM loads for minutes before it refuses a folder, a rank or a template; here that takes milliseconds.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from sotopia_rl.config import Config
from sotopia_rl.errors import ConfigError
from sotopia_rl.llm.endpoint import key_variable, read_key
from sotopia_rl.llm.folders import check_adapter, check_model_folder, template_of

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes as --max-lora-rank (and 1, which no adapter of ours has)."""
HEAD_KEY = "base_model.model.score.weight"

Watch = Callable[[float, str], None]
"""Told, while a server starts, the seconds so far and the last line of its log."""


class VLLMSettings(Config):
    """How vLLM serves; each field is mapped once onto the vLLM option that it stands for."""

    python: Path | None = None
    """Interpreter of the environment that vLLM is installed in; empty takes this one."""
    task: Literal["generate", "reward"] = "generate"
    """`generate` text, or score token ids with `reward` adapters (classification heads included)."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes any free port."""
    served_name: str | None = None
    """What clients call the base; empty takes its folder's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and arithmetic. On CPUs take float32: bfloat16 is many times slower there."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Longest prompt and reply together, in tokens; empty takes the model's own limit."""
    max_loras: int = Field(default=4, gt=0)
    """Adapters in one batch, and kept loaded; with more, vLLM swaps."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] | None = None
    """Largest rank of an adapter; empty takes what the given adapters need, 16 at least."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes; empty leaves vLLM's default."""
    cpu_cache_gigabytes: int | None = Field(default=None, gt=0)
    """On CPUs: memory for the key-value cache; empty leaves vLLM's default."""
    tensor_parallel: int = Field(default=1, gt=0)
    """GPUs that share the model."""
    enforce_eager: bool = False
    """Do not compile: quicker to start, slower afterwards."""
    chunked_prefill: bool = True
    """Off where calls carry seeds on CPUs: vLLM 0.32 dies of a seed while it prefills in chunks."""
    logprobs: Literal["raw", "processed"] = "raw"
    """Log-probabilities from before or after the temperature; GRPO at another temperature than 1 needs the latter."""
    chat_template: Path | None = None
    """Jinja file to use instead of the one that the adapters were trained with (or the base's own, where they bring
    none)."""
    start_timeout_seconds: float = Field(default=900.0, gt=0)
    """Time from the start until it must answer."""


def vllm_command(base: Path, adapters: Mapping[str, Path], settings: VLLMSettings) -> list[str]:
    """The command that serves `base` with `adapters`; what it needs in the environment is in `vllm_environment`.

    Raises:
        ConfigError: A folder is no model or no adapter, an adapter belongs to another base or has too high a rank.
    """
    rank = check_request(base, adapters, settings)
    options: dict[str, object] = {
        "--model": base,
        "--served-model-name": base_name(base, settings),
        "--host": settings.host,
        "--port": settings.port,
        "--dtype": settings.dtype,
        "--max-loras": settings.max_loras,
        "--max-cpu-loras": max(settings.max_loras, len(adapters)),
        "--max-lora-rank": rank,
        "--tensor-parallel-size": settings.tensor_parallel if settings.tensor_parallel > 1 else None,
        "--max-model-len": settings.max_model_len,
        "--gpu-memory-utilization": settings.gpu_memory_utilization,
        "--chat-template": settings.chat_template or adapters_template(adapters),
        "--logprobs-mode": "processed_logprobs" if settings.logprobs == "processed" else None,
        # a base's generation_config.json would add its own top_k and penalties to what callers ask for
        "--generation-config": "vllm",
    }
    if settings.task == "reward":
        options |= _reward_options(adapters)
    command = [str(interpreter(settings)), "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    for name, value in options.items():
        command += [name, str(value)] if value is not None else []
    if settings.enforce_eager:
        command.append("--enforce-eager")
    if not settings.chunked_prefill:
        command.append("--no-enable-chunked-prefill")
    if adapters:
        command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    return command


def adapters_template(adapters: Mapping[str, Path]) -> Path | None:
    """The chat template that adapters were trained with, which vLLM does not look for; None where they bring none.

    Raises:
        ConfigError: They were trained with different ones, and a server has one.
    """
    files = {name: file for name, path in adapters.items() if (file := template_of(path)) is not None}
    texts = {name: file.read_text(encoding="utf-8").strip() for name, file in files.items()}
    if len(set(texts.values())) > 1:
        first, other = next((a, b) for a in texts for b in texts if texts[a] != texts[b])
        raise ConfigError(
            f"adapters {first} and {other} were trained with different chat templates, and a server has one; "
            "serve them apart, or say which one with --chat-template"
        )
    return next((file.resolve() for file in files.values()), None)


def interpreter(settings: VLLMSettings) -> Path:
    """The Python that runs vLLM."""
    return settings.python or Path(sys.executable)


def _reward_options(adapters: Mapping[str, Path]) -> dict[str, object]:
    outputs = {reward_outputs(path) for path in adapters.values()}
    if len(outputs) != 1:
        found = ", ".join(map(str, sorted(outputs))) or "none"
        raise ConfigError(f"a reward server needs reward adapters with one number of outputs (found {found})")
    return {
        "--runner": "pooling",
        "--convert": "classify",
        "--hf-overrides": json.dumps({"num_labels": outputs.pop()}),
        "--pooler-config": json.dumps({"pooling_type": "LAST", "use_activation": False}),
    }


def vllm_environment(settings: VLLMSettings) -> dict[str, str]:
    """Variables that vLLM needs on top of the environment; a key goes here, never into the command line."""
    own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1"}
    if settings.cpu_cache_gigabytes is not None:
        own["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_cache_gigabytes)
    if (key := read_key(key_variable(server_url(settings.host, settings.port)))) is not None:
        own["VLLM_API_KEY"] = key
    return own


def shell_command(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as one would type it, the key replaced by its variable's name."""
    shown = {name: value if name != "VLLM_API_KEY" else "..." for name, value in environment.items()}
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in shown.items()), shlex.join(command)])


def server_url(host: str, port: int) -> str:
    """Where clients on this machine reach a server."""
    return f"http://{'127.0.0.1' if host in {'0.0.0.0', '::', ''} else host}:{port}/v1"  # noqa: S104  compared, not bound


def base_name(base: Path, settings: VLLMSettings) -> str:
    """What clients call the base."""
    return settings.served_name or base.resolve().name


def check_request(base: Path, adapters: Mapping[str, Path], settings: VLLMSettings) -> int:
    """Refuse what vLLM would refuse after minutes of loading, or would serve wrongly.

    Returns:
        The rank to ask vLLM for.

    Raises:
        ConfigError: As `vllm_command`.
    """
    check_model_folder(base)
    if settings.chat_template is not None and not settings.chat_template.is_file():
        raise ConfigError(f"chat_template: {settings.chat_template}: no such file")
    if base_name(base, settings) in adapters:
        raise ConfigError(f"an adapter has the base's name {base_name(base, settings)!r}; name it otherwise")
    for name, path in adapters.items():
        if not name or any(mark in name for mark in "=@ \t\n"):
            raise ConfigError(f"adapter name {name!r}: write letters, digits, dots, dashes or slashes")
        check_adapter(path, base, task="CAUSAL_LM" if settings.task == "generate" else "SEQ_CLS")
    ranks = {name: adapter_rank(path) for name, path in adapters.items()}
    fitting = next((rank for rank in RANKS if rank >= max([16, *ranks.values()])), RANKS[-1])
    limit: int = fitting if settings.max_lora_rank is None else settings.max_lora_rank
    for name, rank in ranks.items():
        if rank > limit:
            raise ConfigError(f"adapter {name} ({adapters[name]}) has rank {rank}, above max_lora_rank {limit}")
    return limit


def adapter_rank(adapter: Path) -> int:
    """The largest rank in an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])


def reward_outputs(adapter: Path) -> int:
    """How many numbers a reward adapter's head gives, from the header of its weights.

    Raises:
        ConfigError: It has no weights or no head.
    """
    path = adapter / "adapter_model.safetensors"
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return int(header[HEAD_KEY]["shape"][0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except KeyError:
        raise ConfigError(f"{adapter}: not a reward model (it has no score head)") from None
