"""`vllm/PATH[:ADAPTER]`: a policy by its folders, on a vLLM server that lives as long as the run.

One process per base, started by the first call; adapters that are named later join it while it runs. The model
string says what plays, not where, so a run goes on on another port.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from sotopia_rl.config import load_config
from sotopia_rl.episode import Sampling
from sotopia_rl.errors import EndpointDownError, ModelCallError, ServingError
from sotopia_rl.llm.client import HttpModel
from sotopia_rl.llm.endpoint import Endpoint, key_variable
from sotopia_rl.llm.limits import Budget, ModelLimits, Tally
from sotopia_rl.llm.prices import Price
from sotopia_rl.models import JsonSchema, Message, Reply
from sotopia_rl.serve.vllm import VLLMServer, check_vllm
from sotopia_rl.serve.vllm_command import VLLMSettings, base_name, check_request, interpreter

logger = logging.getLogger(__name__)

T = TypeVar("T")


def vllm_settings(file: Path | None) -> VLLMSettings:
    """Settings of servers that a run starts for itself; any free port, whatever the file says."""
    settings = VLLMSettings() if file is None else load_config(VLLMSettings, file)
    return settings.model_copy(update={"port": 0})


class ServedBase:
    """One base and its adapters on one vLLM process."""

    def __init__(self, base: Path, settings: VLLMSettings, limits: ModelLimits, budget: Budget) -> None:
        """Raises `ConfigError` where the base is no model, `ServingError` where there is no vLLM."""
        check_request(base, {}, settings)
        check_vllm(interpreter(settings))
        self.base, self.settings, self.limits, self.budget = base, settings, limits, budget
        self._names: dict[Path, str] = {}
        self._server: VLLMServer | None = None
        self._endpoint: Endpoint | None = None
        self._failure: ServingError | None = None
        self._starting = asyncio.Lock()

    def add(self, adapter: Path | None) -> str:
        """What the server will call an adapter, or the base.

        Raises:
            ConfigError: The adapter does not fit.
        """
        if adapter is None:
            return base_name(self.base, self.settings)
        if adapter not in self._names:
            check_request(self.base, {"adapter": adapter}, self.settings)
            self._names[adapter] = f"adapter-{len(self._names)}"
        return self._names[adapter]

    async def endpoint(self, name: str) -> Endpoint:
        """Where `name` is served by now.

        Raises:
            ServingError: vLLM does not start, or refuses the adapter.
        """
        async with self._starting:
            if self._failure is not None:
                raise self._failure
            try:
                return await asyncio.to_thread(self._serving, name)
            except ServingError as error:
                self._failure = error
                raise

    def _serving(self, name: str) -> Endpoint:
        if self._server is None or self._endpoint is None:
            adapters = {known: path for path, known in self._names.items()}
            logger.info("starting vLLM for %s", self.base)
            self._server = VLLMServer(self.base, adapters, self.settings).__enter__()
            url = self._server.url
            self._endpoint = Endpoint(url, self.limits, variable=key_variable(url))
        path = next((path for path, known in self._names.items() if known == name), None)
        if path is not None and name not in self._server.adapters:
            self._server.load_adapter(name, path)
        return self._endpoint

    @property
    def trouble(self) -> str | None:
        """How the server died; None while it lives and before it is started."""
        return self._server.trouble if self._server is not None else None

    async def close(self) -> None:
        """End the server."""
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)
        self._server = self._endpoint = None


@dataclass(eq=False)
class ServedModel:
    """A `ManyRepliesModel` on a `ServedBase`."""

    name: str
    base: ServedBase
    served_name: str
    tally: Tally = field(default_factory=Tally)
    gives_many: bool = True
    _http: HttpModel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._http = None
        await self.base.close()

    async def complete(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        seed: int | None = None,
        schema: JsonSchema | None = None,
    ) -> Reply:
        """As `ChatModel.complete`.

        Raises:
            ServingError: vLLM does not start; the run should stop.
            EndpointDownError: It has died; its last lines are in the message.
            ModelCallError: No reply after every attempt.
        """
        return await self._ask(lambda http: http.complete(messages, sampling, seed=seed, schema=schema))

    async def complete_many(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        n: int,
        *,
        seed: int | None = None,
        schema: JsonSchema | None = None,
    ) -> list[Reply]:
        """As `ManyRepliesModel.complete_many`. Raises as `complete`."""
        return await self._ask(lambda http: http.complete_many(messages, sampling, n, seed=seed, schema=schema))

    async def _ask(self, call: Callable[[HttpModel], Awaitable[T]]) -> T:
        if self._http is None:
            endpoint = await self.base.endpoint(self.served_name)
            price = Price(0.0, 0.0)  # a server of one's own
            self._http = HttpModel(self.name, self.served_name, endpoint, self.base.budget, price, tally=self.tally)
        try:
            return await call(self._http)
        except ModelCallError as error:
            if (trouble := self.base.trouble) is None:
                raise
            raise EndpointDownError(f"{self.name}: {trouble}", model=self.name, kind=error.kind) from None
