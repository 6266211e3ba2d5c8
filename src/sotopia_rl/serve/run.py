"""From strings and settings to a running best-of-N server."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from pathlib import Path

from sotopia_rl.errors import ConfigError, MissingExtraError
from sotopia_rl.llm.endpoint import read_key
from sotopia_rl.llm.open import CustomName, parse_name, resolve_model_folder
from sotopia_rl.serve.best_of_n import BestOfN, BestOfNSettings, Policy
from sotopia_rl.serve.scoring import Batcher, ChatEncoder, PoolingServer, RewardModel
from sotopia_rl.serve.vllm import free_port
from sotopia_rl.serve.vllm_command import server_url
from sotopia_rl.train.heap import keep_freed_memory

KEY_VARIABLE = "SOTOPIA_RL_SERVER_KEY"
"""Environment variable with the key that clients of our servers must send."""


def run_best_of_n(
    policy: str,
    reward_model: str,
    settings: BestOfNSettings,
    *,
    base: Path | None = None,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are finished first.

    Args:
        policy: Model string.
        reward_model: As `open_reward_model`.
        ready: Told the server's model string once it listens.

    Raises:
        ConfigError, DataError, ServingError: Something cannot be opened, or the port is taken.
        MissingExtraError: The extra `serve` or `train` is not installed.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "serve")
    import uvicorn

    from sotopia_rl.serve.app import build_app
    from sotopia_rl.serve.guard import Metrics

    key = read_key(KEY_VARIABLE)
    asked = Policy(policy, settings.policy_limits())
    port = free_port(settings.host, settings.port)
    metrics = Metrics()
    scorer = Batcher(
        open_reward_model(reward_model, settings, base=base),
        max_batch=settings.max_batch,
        wait_seconds=settings.batch_wait_seconds,
        observe=metrics.batch_scored,
    )
    app = build_app(BestOfN(asked, scorer, settings), metrics, key=key)
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # torch and transformers: 600 000 objects, 0.3 s each time that the collector walks them

    class Server(uvicorn.Server):
        async def startup(self, *args: object, **kwargs: object) -> None:
            await super().startup(*args, **kwargs)  # type: ignore[arg-type]
            ready(f"custom/{settings.served_name}@{server_url(settings.host, port)}")

    Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=4096,
            timeout_keep_alive=75,  # longer than clients keep an idle connection: closing one loses requests
            timeout_graceful_shutdown=round(settings.shutdown_seconds),
        )
    ).run()


def open_reward_model(name: str, settings: BestOfNSettings, *, base: Path | None = None) -> RewardModel:
    """A reward model by its folder, or by custom/NAME@URL on a vLLM pooling server.

    Args:
        base: Model folder; needed for a server, since the tokenizer is used here.

    Raises:
        ConfigError, DataError, TrainingError: The folder is wrong, or `base` is missing.
        ServingError: The server does not answer as one.
        MissingExtraError: The extra `train` is not installed.
    """
    for package in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "train")
    folder = resolve_model_folder(base) if base is not None else None
    if not name.startswith("custom/"):
        from sotopia_rl.serve.reward_model import load_reward_model

        return load_reward_model(
            Path(name),
            base=folder,
            device=settings.device,
            dtype=settings.dtype,
            max_length=settings.max_length,
            max_batch_tokens=settings.max_batch_tokens,
        )
    parsed = parse_name(name)
    if not isinstance(parsed, CustomName) or folder is None:
        raise ConfigError(f"{name}: a reward model on a server needs --base, the folder of its tokenizer")
    from sotopia_rl.train.loading import load_tokenizer

    encoder = ChatEncoder(load_tokenizer(folder), settings.max_length)
    found = PoolingServer(parsed.url, parsed.name, encoder, outputs=())
    count = len(found.score([((), (encoder.tokenizer.eos_token_id,))])[0])  # that it answers, and with how many numbers
    found.outputs = ("value",) if count == 1 else tuple(f"output_{index}" for index in range(count))
    return found
