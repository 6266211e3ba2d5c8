"""A local OpenAI-compatible server that answers as it is told, over real HTTP, faults included.

    with FaultyServer(["500", reply("hello")]) as server:
        ... f"custom/any@{server.url}" ...

Each request takes the next answer of the list, the last one again and again. An answer is a function of
(request body) -> Answer, or the name of a fault in `FAULTS`.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from local_server import LocalServer


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Before the answer."""
    close: str = ""
    """`before` the answer or in the `middle` of its body the connection is closed."""


def reply(text: str | None, *, finish_reason: str | None = "stop", usage: Any = ..., seconds: float = 0.0) -> Answer:
    if usage is ...:
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Answer(body=json.dumps({"choices": [choice], "usage": usage}).encode(), seconds=seconds)


def choices(*found: Any) -> Answer:
    """Several choices in one body: texts, None for one without, or a dict that takes the place of a choice."""
    made = [
        choice
        if isinstance(choice, dict)
        else {"index": index, "message": {"role": "assistant", "content": choice}, "finish_reason": "stop"}
        for index, choice in enumerate(found)
    ]
    usage = {"prompt_tokens": 10, "completion_tokens": 5 * len(made), "total_tokens": 10 + 5 * len(made)}
    return Answer(body=json.dumps({"choices": made, "usage": usage}).encode())


def error(status: int, message: str, **headers: str) -> Answer:
    body = json.dumps({"error": {"message": message, "type": "some_error"}}).encode()
    return Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


FAULTS = {
    "400": error(400, "bad request"),
    "401": error(401, "Incorrect API key provided"),
    "404": error(404, "no such model"),
    "429": error(429, "slow down"),
    "500": error(500, "broken"),
    "503-html": Answer(503, b"<html><body><h1>503</h1> Service  Unavailable</body></html>"),
    "closed": Answer(close="before"),
    "half": Answer(body=b'{"choices": [{"message": {"content": "hel', close="middle"),
    "hang": Answer(seconds=60),
    "html": Answer(body=b"<html>welcome to the captive portal</html>"),
    "empty": Answer(),
    "null": Answer(body=b"null"),
    "list": Answer(body=b"[]"),
    "truncated": Answer(body=b'{"choices": [{"message": {"content": "hel'),
    "no-choices": Answer(body=b'{"choices": []}'),
    "null-content": reply(None),
    "surrogate": Answer(body=b'{"choices": [{"message": {"content": "\\ud83d"}}]}'),
    "not-utf8": Answer(body=b'{"choices": "\xff\xfe"}'),
    "redirect": Answer(302, b"", {"Location": "http://127.0.0.1:9/v1/chat/completions"}),
}

Script = Sequence[str | Answer | Callable[[dict[str, Any]], Answer]]


class FaultyServer(LocalServer):
    def __init__(self, script: Script, *, port: int = 0, path: str = "/v1/chat/completions") -> None:
        self.script = script
        self.path = path
        self.port = port
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0

    def routes(self) -> list[web.RouteDef]:
        return [web.post(self.path, self._answer)]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.times.append(self._loop.time())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._play(request, body)
        finally:
            self.at_once -= 1

    async def _play(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        entry = self.script[min(len(self.bodies), len(self.script)) - 1]
        answer = FAULTS[entry] if isinstance(entry, str) else entry if isinstance(entry, Answer) else entry(body)
        await asyncio.sleep(answer.seconds)
        if answer.close == "before":
            request.transport.close()
            return web.Response()
        if answer.close == "middle":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(answer.body)
            request.transport.close()
            return response
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
