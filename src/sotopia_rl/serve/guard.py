"""What stands before the endpoints: key, size, number of requests, and what is counted. Plain ASGI.

A request is turned away before its body is read where that is possible, and its work is cancelled when its client
goes away: an abandoned best-of-N request would keep a policy busy for nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import JSONResponse

from sotopia_rl.serve.protocol import error_body

MutableScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[MutableScope, Receive, Send], Awaitable[None]]

RETRY_AFTER = {"Retry-After": "1"}
_DRAIN_BYTES = 32_000_000
"""So much of a body that is too long is read and thrown away: most clients look at the answer only then."""
_OURS = "sotopia_rl"
_ENDPOINTS = {"/v1/chat/completions", "/v1/score", "/v1/models", "/healthz", "/metrics", "/openapi.json"}
"""What is counted under its own name; the rest of what clients make up is `other`."""


class Metrics:
    """What `/metrics` shows; a registry of its own per server, so that one process can hold several."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.under_way = 0
        """Requests that are being worked on."""
        self.requests = Counter(f"{_OURS}_requests", "Requests answered.", ["endpoint", "status"], registry=own)
        self.seconds = _seconds("request_seconds", "From request to answer.", own, ["endpoint"])
        self.candidates = Counter(f"{_OURS}_candidates", "Replies of the policy, by kind.", ["kind"], registry=own)
        self.tokens = Counter(f"{_OURS}_policy_tokens", "What the policy read and wrote.", ["kind"], registry=own)
        self.batch = Histogram(
            f"{_OURS}_score_batch_replies",
            "Replies per batch of the reward model.",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500),
            registry=own,
        )
        self.batch_seconds = _seconds("score_batch_seconds", "Time per batch of the reward model.", own)
        self.waiting = Gauge(f"{_OURS}_score_waiting_replies", "Replies that wait to be scored.", registry=own)
        self.policy_up = Gauge(f"{_OURS}_policy_up", "1 unless the last call to the policy failed.", registry=own)
        in_progress = Gauge(f"{_OURS}_requests_in_progress", "Requests that are being worked on.", registry=own)
        in_progress.set_function(lambda: self.under_way)

    def batch_scored(self, replies: int, seconds: float) -> None:
        """For `Batcher(observe=...)`."""
        self.batch.observe(replies)
        self.batch_seconds.observe(seconds)


def _seconds(name: str, text: str, registry: CollectorRegistry, labels: Sequence[str] = ()) -> Histogram:
    buckets = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
    return Histogram(f"{_OURS}_{name}", text, labels, buckets=buckets, registry=registry)


@dataclass(eq=False)
class Guard:
    """ASGI middleware around the endpoints under /v1."""

    app: App
    metrics: Metrics
    key: str | None
    max_requests: int
    max_bytes: int

    async def __call__(self, scope: MutableScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # what is counted where the client left
        ended = False

        def count() -> None:
            nonlocal ended
            if not ended:
                ended = True
                endpoint = scope["path"] if scope["path"] in _ENDPOINTS else "other"
                self.metrics.requests.labels(endpoint, str(status)).inc()
                self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - start)

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif _is_last(message):
                count()  # before the client can know: who has its answer may look at once
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        except BaseException:
            status = 500 if status == 499 else status
            raise
        finally:
            count()

    async def _answer(self, scope: MutableScope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"].startswith("/v1/") and not self._may_enter(headers.get(b"authorization", b"")):
            await _refuse(401, "the API key is missing or wrong", "invalid_api_key", {"WWW-Authenticate": "Bearer"})(
                scope, receive, send
            )
        elif scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
        elif self.metrics.under_way >= self.max_requests:
            message = f"{self.metrics.under_way} requests are under way; try again"
            await _refuse(429, message, "overloaded", RETRY_AFTER)(scope, receive, send)
        else:
            self.metrics.under_way += 1
            ended = False

            async def until_the_end(message: MutableMapping[str, Any]) -> None:
                nonlocal ended
                if _is_last(message) and not ended:
                    ended = True  # likewise: it may ask again at once
                    self.metrics.under_way -= 1
                await send(message)

            try:
                await self._post(scope, receive, until_the_end, headers)
            finally:
                self.metrics.under_way -= not ended

    def _may_enter(self, authorization: bytes) -> bool:
        return self.key is None or hmac.compare_digest(authorization, f"Bearer {self.key}".encode())

    async def _post(
        self, scope: MutableScope, receive: Receive, send: Send, headers: MutableMapping[bytes, bytes]
    ) -> None:
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        body = await _read(receive, self.max_bytes)
        if body is None:
            return
        if len(body) > self.max_bytes:
            message = f"the body is longer than {self.max_bytes} bytes"
            await _refuse(413, message, "request_too_large", {"Connection": "close"})(scope, receive, send)
        elif kind != b"application/json":
            message = "send the body as Content-Type: application/json"
            await _refuse(415, message, "unsupported_media_type")(scope, receive, send)
        else:
            await _while_client_is_there(self.app, scope, body, receive, send)


def _is_last(message: MutableMapping[str, Any]) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body")


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or a beginning longer than `limit`; None where the client left."""
    body, length = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        length += len(part)
        if len(body) <= limit:
            body += part
        if not message.get("more_body") or length > limit + _DRAIN_BYTES:
            return bytes(body)


async def _while_client_is_there(app: App, scope: MutableScope, body: bytes, receive: Receive, send: Send) -> None:
    """Run `app` on a body that was read before, and cancel it when the client goes."""
    gone = asyncio.Event()
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    answer = asyncio.ensure_future(app(scope, replay, send))
    watch = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            gone.set()
            answer.cancel()
        await asyncio.gather(answer, return_exceptions=watch.done())
    finally:
        answer.cancel()
        watch.cancel()
        await asyncio.gather(answer, watch, return_exceptions=True)


def _refuse(status: int, message: str, code: str, headers: MutableMapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message, code), status_code=status, headers=headers)
