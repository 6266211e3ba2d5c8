"""Servers of ours on a real port, in a thread, and the smallest client that shows everything of an answer.

with BestOfNServer("custom/p@...", ByLength()) as server:
    status, body, headers = server.post("/v1/chat/completions", {...})
"""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit

import uvicorn

from sotopia_rl.serve.app import build_app
from sotopia_rl.serve.best_of_n import BestOfN, BestOfNSettings, Policy
from sotopia_rl.serve.guard import Metrics
from sotopia_rl.serve.scoring import Batcher, TooLongError
from sotopia_rl.serve.vllm import free_port


class ByLength:
    """A reward model that likes short replies: 1 for an empty one, less with every character."""

    outputs = ("value",)

    def __init__(self, *, max_length: int = 10**9) -> None:
        self.max_length = max_length
        self.batches: list[int] = []

    def encode(self, requests):
        return [self.encode_one(*request) for request in requests]

    def encode_one(self, prompt, replies):
        if (longest := len(prompt[-1].content) + max(map(len, replies), default=1)) > self.max_length:
            raise TooLongError(f"{longest} of {self.max_length}")
        return [((), tuple(map(ord, reply))) for reply in replies]

    def score(self, pairs):
        self.batches.append(len(pairs))
        return [(1 / (1 + len(reply)),) for _, reply in pairs]


class BestOfNServer:
    def __init__(self, policy: str, reward_model: Any, *, key: str | None = None, **settings: Any) -> None:
        self.settings = BestOfNSettings(**{"policy_retries": 0, "port": 0} | settings)
        self.port = free_port("127.0.0.1", 0)
        self.policy, self.reward_model, self.key = policy, reward_model, key

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def model(self) -> str:
        return f"custom/{self.settings.served_name}@{self.url}"

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,))
        self._thread.start()
        assert ready.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self, ready: threading.Event) -> None:
        with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:  # uvloop, as in earnest
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        metrics, settings = Metrics(), self.settings
        policy = Policy(self.policy, settings.policy_limits())
        self.batcher = Batcher(
            self.reward_model,
            max_batch=settings.max_batch,
            wait_seconds=settings.batch_wait_seconds,
            observe=metrics.batch_scored,
        )
        self.app = build_app(BestOfN(policy, self.batcher, settings), metrics, key=self.key)

        class Server(uvicorn.Server):
            async def startup(self, *args, **kwargs):
                await super().startup(*args, **kwargs)
                ready.set()

            async def main_loop(self):
                """As uvicorn's, which looks ten times a second for the end."""
                await self.on_tick(0)
                while not self.should_exit:  # noqa: ASYNC110  uvicorn is told by a flag
                    await asyncio.sleep(0.005)

            async def shutdown(self, sockets=None):
                """As uvicorn's, without its pause where nobody is connected any more."""
                for _ in range(20):
                    if not (self.server_state.connections or self.server_state.tasks):
                        for server in self.servers:
                            server.close()
                            await server.wait_closed()
                        return await self.lifespan.shutdown()
                    await asyncio.sleep(0.005)
                return await super().shutdown(sockets)

        self._server = Server(uvicorn.Config(self.app, port=self.port, log_level="error", timeout_graceful_shutdown=5))
        await self._server._serve()  # without the signal handlers, which a thread cannot have

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return post(self.url, path, body, **headers)

    def send_and_leave(self, path: str, body: Any, when: Callable[[], bool]) -> None:
        """Ask, and close the connection without waiting for the answer."""
        connection = http.client.HTTPConnection(str(urlsplit(self.url).netloc), timeout=30)
        connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        while not when():
            time.sleep(0.02)
        connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self.request("GET", path, None, headers)

    def request(self, method: str, path: str, raw: bytes | None, headers: dict[str, str]) -> tuple[int, Any, dict]:
        return request(self.url, method, path, raw, headers)


def post(url: str, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of what the server at `url` answers."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(url, "POST", path, raw, {"Content-Type": "application/json"} | headers)


def request(url: str, method: str, path: str, raw: bytes | None, headers: dict[str, str]) -> tuple[int, Any, dict]:
    connection = http.client.HTTPConnection(str(urlsplit(url).netloc), timeout=30)
    try:
        connection.request(method, path, raw, headers)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    kind = response.getheader("Content-Type", "")
    return response.status, json.loads(text) if kind == "application/json" else text, dict(response.getheaders())
