"""Sampling from vLLM servers over HTTP: token ids in, token ids and their log-probabilities out. No torch here.

An answer is believed only as a whole: the right version of the policy, the prompt that was sent, as many completions
as were asked for, each with a probability per token. Anything else is asked for again, and then is an error; an empty
or shortened completion never becomes a row of training.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from sotopia_rl.errors import RolloutError, ServingError
from sotopia_rl.llm.endpoint import Endpoint, key_variable
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.serve.vllm import load_adapter, unload_adapter

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 30.0
START = (
    "start vLLM with --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and a --max-lora-rank "
    "that fits the adapter (`sotopia-rl serve vllm` does)"
)


@dataclass(frozen=True)
class Version:
    """A state of the policy as the servers know it; equal weights have equal names."""

    name: str
    path: Path


@dataclass(frozen=True)
class Completion:
    """What was sampled.

    Attributes:
        token_ids: [T], the end-of-sequence token included where one was sampled.
        logprobs: [T] log-probabilities under the distribution that was sampled from.
    """

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Request:
    """One prompt and how many completions it wants."""

    prompt_ids: tuple[int, ...]
    count: int


class _Trouble(Exception):  # noqa: N818 - never leaves this module
    """One attempt failed; `lost` says that the server does not know the version."""

    def __init__(self, text: str, *, again: bool = True, lost: bool = False) -> None:
        super().__init__(text)
        self.again = again
        self.lost = lost


@dataclass(frozen=True)
class VLLMServers:
    """Servers of one base that share the work; each gets every `len(urls)`-th prompt."""

    urls: tuple[str, ...]
    """Each with `/v1`."""
    eos_token_id: int
    vocabulary: int
    """Token ids are below this."""
    max_tokens: int
    temperature: float
    timeout_seconds: float = 600.0
    """Of one request, from sending to the last byte."""
    retries: int = 3
    """Further attempts per request, after pauses of 1, 2, 4, ... seconds."""
    backoff_seconds: float = 1.0

    def check(self, max_length: int) -> None:
        """Make sure that every server answers and takes sequences of `max_length` tokens.

        Raises:
            RolloutError: One does not; it is named.
        """
        for url in self.urls:
            limit = self._models(url)[0].get("max_model_len")
            if isinstance(limit, int) and limit < max_length:
                raise RolloutError(
                    f"{url}: takes sequences of {limit} tokens, and max_prompt_length + max_completion_length is "
                    f"{max_length}; start it with --max-model-len {max_length}, or lower the limits"
                )

    def check_logprobs(self, version: Version) -> None:
        """Make sure that probabilities are those sampled from where the temperature is not 1.

        vLLM's default is to report them before the temperature is applied, which the importance correction cannot
        use. Two temperatures that give the same probability tell.

        Raises:
            RolloutError: A server reports them so, or does not answer.
        """
        if self.temperature == 1:
            return
        for url in self.urls:
            plain, scaled = (self._top_logprob(url, version, temperature) for temperature in (1.0, self.temperature))
            if math.isclose(plain, scaled, rel_tol=1e-4, abs_tol=1e-6):
                raise RolloutError(
                    f"{url}: reports log-probabilities before the temperature ({self.temperature:g}) is applied; "
                    "start it with --logprobs-mode processed_logprobs (`serve vllm --logprobs processed`), or set "
                    "vllm_importance: none"
                )

    def load(self, version: Version) -> None:
        """Have every server serve `version`.

        Raises:
            RolloutError: One does not take it; it is named.
        """
        for url in self.urls:
            self._load(url, version)

    def _load(self, url: str, version: Version) -> None:
        try:
            load_adapter(url, version.name, version.path, timeout_seconds=self.timeout_seconds)
        except ServingError as error:
            raise RolloutError(f"{error}; {START}, and see that it can read {version.path}") from error

    def unload_others(self, prefix: str, keep: Version | None) -> None:
        """Have the servers forget versions whose name starts with `prefix`, all but `keep`.

        Raises:
            RolloutError: A server does not answer.
        """
        for url in self.urls:
            for name in [str(model.get("id")) for model in self._models(url)]:
                if name.startswith(prefix) and (keep is None or name != keep.name):
                    try:
                        unload_adapter(url, name, timeout_seconds=self.timeout_seconds)
                    except ServingError as error:  # it costs memory there, nothing more
                        logger.info("%s", error)

    def sample(self, version: Version, requests: Sequence[Request], *, first: int = 0) -> list[list[Completion]]:
        """Completions of each request, sampled from `version`.

        Args:
            first: Which server gets the first request; so that processes do not all begin with the same one.

        Raises:
            RolloutError: A server gave no whole answer in `retries` + 1 attempts; it is named.
        """
        return asyncio.run(self._sample(version, requests, first))

    async def _sample(self, version: Version, requests: Sequence[Request], first: int) -> list[list[Completion]]:
        endpoints = [self._endpoint(url) for url in self.urls]
        calls: list[asyncio.Task[list[Completion]]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for number, request in enumerate(requests):
                    endpoint = endpoints[(first + number) % len(endpoints)]
                    calls.append(group.create_task(self._complete(endpoint, version, request)))
        except* RolloutError as errors:
            raise _first(errors) from None
        finally:
            for endpoint in endpoints:
                await endpoint.close()
        return [call.result() for call in calls]

    async def _complete(self, endpoint: Endpoint, version: Version, request: Request) -> list[Completion]:
        body = {
            "model": version.name,
            "prompt": list(request.prompt_ids),
            "n": request.count,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": [self.eos_token_id],
            # said outright: a server may take other defaults from the base's generation_config.json
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        pause = self.backoff_seconds
        for attempt in range(1, self.retries + 2):
            try:
                return self._completions(await _exchange(endpoint, "completions", body), version, request)
            except _Trouble as trouble:
                if attempt > self.retries or not trouble.again:
                    tries = f" (after {attempt} attempts)" if attempt > 1 else ""
                    raise RolloutError(f"{endpoint.url}: {trouble}{tries}") from None
                logger.info("%s: attempt %d: %s", endpoint.url, attempt, trouble)
                if trouble.lost:  # restarted since: it knows the base alone
                    await asyncio.to_thread(self._load, endpoint.url, version)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    def _completions(self, data: Any, version: Version, request: Request) -> list[Completion]:
        """The completions in an answer, if it is whole."""
        try:
            served, choices = data["model"], sorted(data["choices"], key=lambda choice: int(choice["index"]))
        except (KeyError, TypeError, ValueError):
            raise _Trouble(f"no completions in the answer: {_short(json.dumps(data))}") from None
        if served != version.name:
            raise _Trouble(f"answered as {served!r}, asked for {version.name!r}")
        if len(choices) != request.count:
            raise _Trouble(f"gave {len(choices)} of {request.count} completions")
        return [self._completion(choice, request) for choice in choices]

    def _completion(self, choice: dict[str, Any], request: Request) -> Completion:
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if ids is None:
            raise _Trouble("gives no token ids (return_token_ids needs vLLM 0.10.2 or newer)", again=False)
        echoed, logprobs = choice.get("prompt_token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if echoed is not None and echoed != list(request.prompt_ids):
            raise _Trouble("answered another prompt than the one that was sent")
        if not _are_ids(ids, self.vocabulary):
            raise _Trouble(f"sampled no tokens, or ids that are none of the vocabulary: {_short(str(ids))}")
        if not isinstance(logprobs, list) or len(logprobs) != len(ids) or not all(map(_is_logprob, logprobs)):
            raise _Trouble(f"gave no log-probability for each of {len(ids)} tokens")
        if not (reason == "stop" or (reason == "length" and len(ids) == self.max_tokens)):
            raise _Trouble(f"broke off after {len(ids)} of {self.max_tokens} tokens ({reason})")
        return Completion(ids, [float(value) for value in logprobs])

    def _top_logprob(self, url: str, version: Version, temperature: float) -> float:
        """The largest log-probability of a first token, as the server reports it."""
        body = {
            "model": version.name,
            "prompt": [self.eos_token_id],
            "max_tokens": 1,
            "temperature": temperature,
            "logprobs": 1,
        }
        data = asyncio.run(self._once(url, "completions", body))
        try:
            return max(float(value) for value in data["choices"][0]["logprobs"]["top_logprobs"][0].values())
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise RolloutError(f"{url}: gives no log-probabilities: {_short(json.dumps(data))}") from None

    def _models(self, url: str) -> list[dict[str, Any]]:
        """What a server serves, its base first."""
        answer = asyncio.run(self._once(url, "models"))
        models = answer.get("data") if isinstance(answer, dict) else None
        if not (isinstance(models, list) and models and all(isinstance(model, dict) for model in models)):
            raise RolloutError(f"{url}: is no vLLM server (models: {_short(json.dumps(answer))})")
        return models

    async def _once(self, url: str, path: str, body: Any = None) -> Any:
        """One exchange, without further attempts."""
        endpoint = self._endpoint(url)
        try:
            return await _exchange(endpoint, path, body)
        except _Trouble as trouble:
            raise RolloutError(f"{url}: {trouble}") from None
        finally:
            await endpoint.close()

    def _endpoint(self, url: str) -> Endpoint:
        return Endpoint(url, ModelLimits(timeout_seconds=self.timeout_seconds), variable=key_variable(url))


async def _exchange(endpoint: Endpoint, path: str, body: Any = None) -> Any:
    """One HTTP exchange, the JSON that came back."""
    method = "GET" if body is None else "POST"
    try:
        async with endpoint.session().request(method, f"{endpoint.url}/{path}", json=body) as response:
            raw = await response.read()
    except TimeoutError:
        raise _Trouble(f"no answer within {endpoint.limits.timeout_seconds:g} seconds") from None
    except (aiohttp.ClientError, OSError) as error:
        raise _Trouble(f"no connection ({_short(endpoint.redact(str(error) or type(error).__name__))})") from None
    words = _short(endpoint.redact(raw[:2000].decode("utf-8", "replace")))
    if response.status != 200:
        if response.status in {401, 403}:
            words += f" (key from {endpoint.variable}{'' if endpoint.has_key else ', which is not set'})"
        again = response.status in {404, 408, 409, 425, 429} or response.status >= 500
        raise _Trouble(f"HTTP {response.status}: {words}", again=again, lost=response.status == 404)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise _Trouble(f"the answer is not JSON: {words}") from None


def _first(errors: BaseExceptionGroup[RolloutError]) -> RolloutError:
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, RolloutError)
    return found


def _are_ids(ids: Any, vocabulary: int) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(i) is int and 0 <= i < vocabulary for i in ids)


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3


def _short(text: str, *, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."
