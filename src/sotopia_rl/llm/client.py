"""The client of OpenAI-compatible servers, on aiohttp.

aiohttp because httpx, and with it the openai SDK, spends time quadratic in the number of connections. A call has
a deadline and a bounded number of further attempts; how it ended is one of the kinds of `FailureKind`. No pydantic
on the way in: a reply is a few fields of a JSON body, checked by hand.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Self

import aiohttp
from pydantic_core import from_json, to_json

from sotopia_rl.episode import Sampling, Usage
from sotopia_rl.errors import ContextLengthError, EndpointDownError, FailureKind, ModelCallError
from sotopia_rl.llm.endpoint import Endpoint, Health
from sotopia_rl.llm.limits import Budget, Tally
from sotopia_rl.llm.prices import Price
from sotopia_rl.models import JsonSchema, Message, Reply

logger = logging.getLogger(__name__)

_MAX_BAD_BODIES = 2
"""Further attempts after a 200 whose body is no reply: each may have been paid for."""
_BYTES_PER_TOKEN = 3
"""For the worst cost of a prompt before its tokens are counted; English has more bytes per token."""


class _Trouble(Exception):  # noqa: N818 - never leaves this module
    """One attempt gave no reply.

    Attributes:
        again: Worth another attempt.
        hopeless: Every other call will fail the same way.
        counts: Says something about the endpoint's health.
    """

    def __init__(
        self,
        kind: FailureKind,
        text: str,
        *,
        again: bool = False,
        hopeless: bool = False,
        counts: bool = True,
        wait_seconds: float = 0.0,
    ) -> None:
        super().__init__(text)
        self.kind: FailureKind = kind
        self.again = again
        self.hopeless = hopeless
        self.counts = counts
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class _Asked:
    """What a call asks for."""

    messages: Sequence[Message]
    sampling: Sampling
    n: int
    seed: int | None
    schema: JsonSchema | None


@dataclass(eq=False)
class HttpModel:
    """A `ManyRepliesModel` behind an OpenAI-compatible endpoint."""

    name: str
    """The model string."""
    served_name: str
    """What the server calls it."""
    endpoint: Endpoint
    budget: Budget
    price: Price | None
    max_tokens_field: str = "max_tokens"
    """OpenAI's newer models take `max_completion_tokens`."""
    tally: Tally = field(default_factory=Tally)
    gives_many: bool = True
    """False once the server has given one choice where it was asked for more."""

    def __post_init__(self) -> None:
        self.tally.cost_known = self.price is not None
        self._health = Health(self.endpoint.limits.down_after_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.endpoint.close()

    async def complete(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        seed: int | None = None,
        schema: JsonSchema | None = None,
    ) -> Reply:
        """One reply; see `ChatModel.complete`.

        Raises:
            EndpointDownError: The endpoint has been found down; the run should stop.
            BudgetError: The spend cap leaves no room for the call.
            ContextLengthError: The server says that it is too long for the model.
            ModelCallError: No reply after every attempt.
        """
        (reply,) = await self.complete_many(messages, sampling, 1, seed=seed, schema=schema)
        return reply

    async def complete_many(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        n: int,
        *,
        seed: int | None = None,
        schema: JsonSchema | None = None,
    ) -> list[Reply]:
        """Up to n replies, asked for by `n` in one request; see `ManyRepliesModel.complete_many`.

        Fewer come from a server that ignores `n`, and where some of the choices hold no text. The server makes what
        it needs of the one seed (vLLM: another for each choice).

        Raises:
            As `complete`; a `ModelCallError` also where the server refuses `n`.
        """
        try:
            replies = await self._complete(_Asked(messages, sampling, n, seed, schema))
        except ModelCallError:
            self.tally.failed += 1
            raise
        self.tally.add(replies[0].usage)
        return replies

    async def _complete(self, asked: _Asked) -> list[Reply]:
        attempts = bad_bodies = 0
        while True:
            self._refuse_if_down()
            attempts += 1
            try:
                replies = await self._attempt(asked)
            except _Trouble as trouble:
                bad_bodies += trouble.kind == "bad_reply"
                again = trouble.again and attempts <= self.endpoint.limits.max_retries
                if not again or bad_bodies > _MAX_BAD_BODIES:
                    raise self._error(trouble, attempts, asked.n) from None  # its causes hold request headers
                pause = self._pause(trouble, attempts)
                logger.info("%s: attempt %d: %s; again in %.1f s", self.name, attempts, trouble, pause)
            else:
                self._health.success()
                return replies
            self.tally.retries += 1
            await asyncio.sleep(pause)

    def _refuse_if_down(self) -> None:
        health = self._health
        if health.down:
            raise EndpointDownError(
                f"{self.name}: given up after {health.failures} failures in a row, the last: {health.cause}",
                model=self.name,
                kind=health.kind,
            )

    def _error(self, trouble: _Trouble, attempts: int, n: int) -> ModelCallError:
        tries = f" (after {attempts} attempts)" if attempts > 1 else ""
        this_request = trouble.kind == "http_4xx" and not (trouble.again or trouble.hopeless)
        if this_request and _is_about_length(str(trouble)):
            return ContextLengthError(f"{self.name}: {trouble}", model=self.name, kind=trouble.kind)
        hint = f"; it was asked for n={n}: if it takes no n, say --no-share-prompt" if n > 1 and this_request else ""
        return ModelCallError(f"{self.name}: {trouble}{tries}{hint}", model=self.name, kind=trouble.kind)

    def _pause(self, trouble: _Trouble, attempts: int) -> float:
        """Seconds until the next attempt: what the server asks, or exponential with jitter."""
        limits = self.endpoint.limits
        backoff = limits.backoff_seconds * 2.0 ** (attempts - 1) * random.uniform(0.5, 1)
        return min(max(trouble.wait_seconds, backoff), limits.max_wait_seconds)

    async def _attempt(self, asked: _Asked) -> list[Reply]:
        """One attempt; where the server refuses the schema, once more without it.

        Raises:
            _Trouble: It gave no reply.
        """
        refused, schema = self.endpoint.refused_schemas, asked.schema
        constrained = schema is not None and not (refused and json.dumps(schema) in refused)
        body = self._body(asked, schema if constrained else None)
        try:
            return await self._paid_exchange(body, asked)
        except _Trouble as trouble:
            if not (constrained and trouble.kind == "http_4xx" and _is_about_schema(str(trouble))):
                self._note(trouble)
                raise
            logger.warning("%s: takes no such JSON schema, which is left out from now on: %s", self.name, trouble)
            refused.add(json.dumps(schema))
        return await self._attempt(asked)

    def _note(self, trouble: _Trouble) -> None:
        if trouble.counts:
            self._health.failure(trouble.kind, str(trouble), hopeless=trouble.hopeless)

    def _body(self, asked: _Asked, schema: JsonSchema | None) -> bytes:
        body: dict[str, Any] = {
            "model": self.served_name,
            "messages": [{"role": message.role, "content": message.content} for message in asked.messages],
            "temperature": asked.sampling.temperature,
            "top_p": asked.sampling.top_p,
            self.max_tokens_field: asked.sampling.max_tokens,
        }
        if asked.n > 1:
            body["n"] = asked.n
        if asked.seed is not None and self.endpoint.limits.send_seed:
            body["seed"] = asked.seed
        if schema is not None:
            json_schema = {"name": "reply", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return to_json(body)  # a third of the time of json.dumps, which is half of what a call costs here

    async def _paid_exchange(self, body: bytes, asked: _Asked) -> list[Reply]:
        """An exchange within the budget."""
        if self.price is None:
            return self._replies(await self._exchange(body), asked.n)
        worst_usd = self.price.cost(len(body) // _BYTES_PER_TOKEN, asked.n * asked.sampling.max_tokens)
        await self.budget.reserve(worst_usd, model=self.name)
        cost_usd = 0.0
        try:
            raw = await self._exchange(body)
            cost_usd = worst_usd  # answered: paid for, whatever the body turns out to be
            replies = self._replies(raw, asked.n)
            if replies[0].usage.prompt_tokens:
                cost_usd = replies[0].usage.cost_usd
            return replies
        finally:
            self.budget.settle(worst_usd, cost_usd)

    async def _exchange(self, body: bytes) -> bytes:
        """Send a body and read the whole answer.

        Raises:
            _Trouble: No answer came in time, or its status is not 200.
        """
        endpoint = self.endpoint
        async with endpoint.slots:
            await endpoint.pace.turn()
            self._refuse_if_down()
            try:
                async with endpoint.session().post(endpoint.address, data=body, allow_redirects=False) as response:
                    raw = await response.read()
            except TimeoutError:
                limit = endpoint.limits.timeout_seconds
                raise _Trouble("timeout", f"no reply within {limit:g} seconds", again=True) from None
            except (aiohttp.ClientError, OSError) as error:
                never = isinstance(error, aiohttp.ClientConnectorError)
                raise _Trouble("connection", self._connection_words(error), again=True, hopeless=never) from None
        if response.status != 200:
            raise self._status_trouble(response.status, response.headers, raw)
        return raw

    def _connection_words(self, error: Exception) -> str:
        words = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        text = (getattr(words, "strerror", None) or str(words)).strip() or type(error).__name__
        verb = "cannot connect" if isinstance(error, aiohttp.ClientConnectorError) else "connection lost"
        return f"{verb} ({_short(self.endpoint.redact(text))})"

    def _status_trouble(self, status: int, headers: Mapping[str, str], raw: bytes) -> _Trouble:
        text = f"HTTP {status}: {self._server_words(raw)}"
        if status == 429 and "insufficient_quota" not in text:
            wait = _retry_after(headers)
            if wait:
                self.endpoint.pace.hold(min(wait, self.endpoint.limits.max_wait_seconds))
            return _Trouble("rate_limited", text, again=True, counts=False, wait_seconds=wait)
        if status == 502 and "(no_valid_candidate)" in text:  # our best-of-N server is well, its policy is not
            return _Trouble("bad_reply", text, again=True, counts=False)
        if status >= 500:
            return _Trouble("http_5xx", text, again=True, wait_seconds=_retry_after(headers))
        if status in {408, 409, 425}:
            return _Trouble("http_4xx", text, again=True)
        if status < 400:
            return _Trouble("bad_reply", f"HTTP {status} where 200 was expected; give the endpoint's final URL")
        if status in {401, 403}:
            text += f" (key from {self.endpoint.variable}{'' if self.endpoint.has_key else ', which is not set'})"
        hopeless = status in {401, 403, 404, 405, 429}
        return _Trouble("http_4xx", text, hopeless=hopeless, counts=hopeless)

    def _server_words(self, raw: bytes) -> str:
        """The server's own message, on one short line and without the key."""
        text = self.endpoint.redact(raw[:20_000].decode("utf-8", "replace"))
        try:
            found = _message_in(json.loads(text))
        except (ValueError, RecursionError):
            found = re.sub(r"<[^>]*>", " ", text)
        return _short(found) or "no message"

    def _replies(self, raw: bytes, n: int) -> list[Reply]:
        """The first n replies in the body of a 200, usage with the first; choices that are none are left out.

        Raises:
            _Trouble: There is no reply in it.
        """
        try:
            data = from_json(raw)  # a third of the time of json.loads
        except ValueError as error:
            start = self.endpoint.redact(raw[:2_000].decode("utf-8", "replace"))
            raise _Trouble("bad_reply", f"the body is not JSON ({error}): {_short(start)!r}", again=True) from None
        choices = data.get("choices") if isinstance(data, dict) else None
        if not isinstance(choices, list) or not choices:
            raise self._no_choices(raw)
        found: list[tuple[str, str]] = []
        troubles: list[_Trouble] = []
        for choice in choices[:n]:
            try:
                found.append(self._text(choice, raw))
            except _Trouble as trouble:
                troubles.append(trouble)
        if not found:
            raise troubles[0]
        for broken in troubles:
            logger.info("%s: one of %d choices is left out: %s", self.name, len(choices), broken)
        if len(choices) == 1 < n and self.gives_many:
            self.gives_many = False
            logger.warning("%s: takes no `n` (one choice where %d were asked for)", self.name, n)
        usages = [self._usage(data.get("usage")), *[Usage()] * (len(found) - 1)]
        return [
            Reply(text=text, usage=usage, finish_reason=reason)
            for (text, reason), usage in zip(found, usages, strict=True)
        ]

    def _text(self, choice: Any, raw: bytes) -> tuple[str, str]:
        """What a choice says, and why it ends there.

        Raises:
            _Trouble: It holds no text.
        """
        try:
            message, finish_reason = choice["message"], choice.get("finish_reason") or "stop"
            content = message["content"]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._no_choices(raw) from None
        if content is None and finish_reason == "length":
            content = ""  # a reasoning model that thought up to its limit
        if not isinstance(content, str):
            words = _short(self.endpoint.redact(str(message.get("refusal") or content)))
            raise _Trouble("bad_reply", f"the reply holds no text ({words})", again=True)
        if self.endpoint.holds_key(content):
            content = self.endpoint.redact(content)
        return content, str(finish_reason)

    def _no_choices(self, raw: bytes) -> _Trouble:
        return _Trouble("bad_reply", f"no choices in the body: {self._server_words(raw)}", again=True)

    def _usage(self, found: Any) -> Usage:
        if not isinstance(found, dict):
            return Usage(calls=1)
        prompt, completion = (
            value if isinstance(value := found.get(key), int) and value >= 0 else 0
            for key in ("prompt_tokens", "completion_tokens")
        )
        cost_usd = self.price.cost(prompt, completion) if self.price else 0.0
        return Usage(calls=1, prompt_tokens=prompt, completion_tokens=completion, cost_usd=cost_usd)


def _is_about_schema(text: str) -> bool:
    return any(word in text for word in ("response_format", "json_schema", "schema", "structured output"))


def _is_about_length(text: str) -> bool:
    """OpenAI's code, the words of its message and of vLLM's, and vLLM's for a `max_tokens` above the whole context."""
    return any(words in text for words in ("context_length_exceeded", "maximum context length", "max_model_len"))


def _message_in(data: Any) -> str:
    """The message in an error body: OpenAI's, vLLM's or FastAPI's form, else all of it."""
    error = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(error, dict):
        code = error.get("code") or error.get("type") or ""
        words = error.get("message") or error.get("detail") or error
        return f"{words} ({code})" if code and isinstance(code, str) and code not in str(words) else str(words)
    return str(error)


def _short(text: str, *, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, 0 where it asks nothing: a number of seconds or an HTTP date."""
    value = headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0
