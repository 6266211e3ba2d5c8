"""Best-of-N: ask a policy N times, keep the replies that are valid, let a reward model choose.

No HTTP here; `app.py` puts this behind an OpenAI-compatible one. What cannot be answered is an error with a status
and a reason: a request fails if a single one of its N replies cannot be had (fewer candidates would be another
system), and if no candidate is valid. Nothing else is ever given out as a reply.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field

from sotopia_rl.config import Config
from sotopia_rl.episode import Sampling, Usage
from sotopia_rl.errors import (
    ContextLengthError,
    EndpointDownError,
    FailureKind,
    ModelCallError,
    ServingError,
    SotopiaRLError,
)
from sotopia_rl.llm.extract import UnusableReply
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.models import ChatModel, JsonSchema, Message, Reply, gives_many
from sotopia_rl.serve.scoring import Batcher, Scores, TooLongError
from sotopia_rl.simulate import parse_action

T = TypeVar("T")

_PROBLEMS_TOLD = 3


class BestOfNSettings(Config):
    """How the best-of-N server works."""

    candidates: int = Field(default=10, gt=0, le=256)
    """Replies asked of the policy per request; a request may ask for fewer or more with `best_of`."""
    max_candidates: int = Field(default=64, gt=0, le=1024)
    """Most that a request may ask for."""
    gate: Literal["action", "none"] = "action"
    """`action` lets only replies through that are one of SOTOPIA's actions as JSON; `none` any text that is whole."""
    weights: tuple[float, ...] = ()
    """Of the reward model's outputs, in their order; empty means equal."""
    served_name: str = Field(default="best-of-n", min_length=1)
    """What clients call this model."""
    host: str = "127.0.0.1"
    port: int = Field(default=8100, ge=0, le=65535)
    """0 takes any free port."""
    max_tokens: int = Field(default=512, gt=0)
    """Longest reply where a request names no limit."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Where a request names none."""
    max_requests: int = Field(default=128, gt=0)
    """Requests at once; further ones are answered with 429 and Retry-After."""
    max_request_bytes: int = Field(default=1_000_000, gt=0)
    """Longer bodies are answered with 413."""
    max_batch: int = Field(default=256, gt=0)
    """Replies in one batch of the reward model."""
    max_batch_tokens: int = Field(default=32_768, gt=0)
    """Tokens in one forward pass of the reward model, padding included."""
    batch_wait_seconds: float = Field(default=0.002, ge=0, le=1)
    """How long a batch that is not full waits for more."""
    max_length: int = Field(default=4096, gt=0)
    """Longest prompt and reply in the reward model's tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a reward model in this process runs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of its weights."""
    policy_timeout_seconds: float = Field(default=120.0, gt=0)
    """Deadline of one call to the policy."""
    policy_retries: int = Field(default=1, ge=0)
    """Further attempts of one call to the policy after a 429, a 5xx or a lost connection."""
    policy_in_flight: int = Field(default=1024, gt=0)
    """Calls to the policy at once."""
    share_prompt: bool = True
    """Ask an HTTP policy for all candidates by `n` in one call; off for servers that refuse `n`."""
    send_seed: bool = True
    """Send the policy sampling seeds; off for vLLM 0.32 on CPUs."""
    vllm: Path | None = None
    """Where the policy is vllm/PATH:ADAPTER: YAML file with settings of `serve vllm`."""
    shutdown_seconds: float = Field(default=30.0, ge=0)
    """On SIGTERM: time that requests under way have to finish."""

    def policy_limits(self) -> ModelLimits:
        """Limits on calls to the policy: brief, because a client waits and can try again itself."""
        return ModelLimits(
            timeout_seconds=self.policy_timeout_seconds,
            max_retries=self.policy_retries,
            max_in_flight=self.policy_in_flight,
            backoff_seconds=0.2,
            max_wait_seconds=2.0,
            send_seed=self.send_seed,
            device=self.device,
            vllm=self.vllm,
        )


class AnswerError(ServingError):
    """A request has no answer.

    Attributes:
        status: HTTP status.
        code: For programs.
    """

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Candidate:
    """One of the N replies. `problem` says why it is not valid; `count` how often it came."""

    text: str
    problem: str | None
    count: int
    outputs: Scores = ()
    score: float | None = None


@dataclass(frozen=True)
class Choice:
    """The candidates, distinct, the best first and the invalid ones last; and what the policy's calls took."""

    candidates: tuple[Candidate, ...]
    usage: Usage

    @property
    def valid(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.problem is None)


class Policy:
    """The model that is asked, opened anew after it was given up: a server outlives its policy's restarts.

    Attributes:
        trouble: Of the last call; None while calls succeed, and before the first.
    """

    def __init__(self, name: str, limits: ModelLimits) -> None:
        self.name = name
        self.limits = limits
        self.trouble: str | None = None
        self._pool = ModelPool(limits)
        self._pool.get(name)  # a wrong string is found at once

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, *, seed: int | None, schema: JsonSchema | None
    ) -> Reply:
        """As `ChatModel.complete`; that the policy was given up before is no reason not to ask it."""
        return await self._ask(lambda model: model.complete(messages, sampling, seed=seed, schema=schema))

    async def complete_many(
        self, messages: Sequence[Message], sampling: Sampling, n: int, *, seed: int | None, schema: JsonSchema | None
    ) -> list[Reply]:
        """As `ManyRepliesModel.complete_many`, and none at all from a policy that gives one reply a call."""
        if n == 1 or not gives_many(self._pool.get(self.name)):
            return []

        async def call(model: ChatModel) -> list[Reply]:
            if not gives_many(model):  # opened anew, and another request has found out
                return []
            return await model.complete_many(messages, sampling, n, seed=seed, schema=schema)

        return await self._ask(call)

    async def _ask(self, call: Callable[[ChatModel], Awaitable[T]]) -> T:
        pool = self._pool
        try:
            try:
                found = await call(pool.get(self.name))
            except EndpointDownError:
                await self._open_anew(pool)
                found = await call(self._pool.get(self.name))
        except ModelCallError as error:
            self.trouble = str(error)
            raise
        self.trouble = None
        return found

    async def _open_anew(self, pool: ModelPool) -> None:
        """Replace `pool`, unless another call has done so already."""
        if pool is self._pool:
            self._pool = ModelPool(self.limits)
            await pool.__aexit__()

    async def close(self) -> None:
        await self._pool.__aexit__()


class BestOfN:
    """async with BestOfN(policy, scorer, settings) as chooser: choice = await chooser.choose(...)"""

    def __init__(self, policy: Policy, scorer: Batcher, settings: BestOfNSettings) -> None:
        """Raises `ServingError` where the weights do not fit the reward model."""
        outputs = scorer.model.outputs
        if settings.weights and len(settings.weights) != len(outputs):
            raise ServingError(f"{len(settings.weights)} weights for {len(outputs)} outputs ({', '.join(outputs)})")
        weights = settings.weights or (1.0,) * len(outputs)
        if sum(weights) <= 0 or min(weights) < 0:
            raise ServingError(f"weights {weights}: none may be negative and one must be above zero")
        self.policy = policy
        self.scorer = scorer
        self.settings = settings
        self.shares = tuple(weight / sum(weights) for weight in weights)

    async def __aenter__(self) -> Self:
        await self.scorer.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.scorer.__aexit__(*exc)
        await self.policy.close()

    async def choose(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        n: int,
        seed: int | None = None,
        schema: JsonSchema | None = None,
    ) -> Choice:
        """Candidates for one reply, scored and in order.

        Args:
            n: How many replies the policy is asked for; one where it is greedy, since all would be the same.

        Raises:
            AnswerError: There is no valid candidate, the prompt is too long for the policy or the reward model, or one
                of them cannot be had.
        """
        if sum(len(message.content.encode()) for message in messages) >= self.scorer.model.max_length:
            # it may be too long (a token is a byte at least): found out before the policy works for nothing
            await self.score(messages, [])
        calls = 1 if sampling.temperature == 0 else n
        replies = await self._ask(messages, sampling, [candidate_seed(seed, i) for i in range(calls)], schema)
        distinct: dict[tuple[str, str | None], int] = {}
        for reply in replies:
            key = (reply.text, self.problem_of(reply.text, finish_reason=reply.finish_reason))
            distinct[key] = distinct.get(key, 0) + 1
        valid = [text for text, problem in distinct if problem is None]
        if not valid:
            raise AnswerError(_none_valid(distinct), status=502, code="no_valid_candidate")
        scores = dict(zip(valid, await self.score(messages, valid), strict=True))
        candidates = [
            Candidate(text, problem, count, *(scores[text] if problem is None else ((), None)))
            for (text, problem), count in distinct.items()
        ]
        # sorted() keeps the order of sampling among equal scores
        candidates.sort(key=lambda c: (c.score is None, -(c.score or 0.0)))
        return Choice(tuple(candidates), sum((reply.usage for reply in replies), Usage()))

    async def score(self, messages: Sequence[Message], texts: Sequence[str]) -> list[tuple[Scores, float]]:
        """The reward model's outputs for replies to one prompt, and their weighted mean.

        Raises:
            AnswerError: The replies are too long (400), or the reward model cannot be had (503).
        """
        try:
            found = await self.scorer.score(messages, texts)
        except TooLongError as error:
            raise AnswerError(str(error), status=400, code="context_length_exceeded") from error
        except ServingError as error:
            raise AnswerError(f"reward model: {error}", status=503, code="reward_model_unavailable") from error
        return [
            (outputs, sum(share * number for share, number in zip(self.shares, outputs, strict=True)))
            for outputs in found
        ]

    def problem_of(self, text: str, *, finish_reason: str = "stop") -> str | None:
        """Why a reply cannot be given out; None where it can."""
        if finish_reason == "length":
            return "it was cut off at the token limit"
        if not text.strip():
            return "it is empty"
        if self.settings.gate == "none":
            return None
        try:
            parse_action(text)
        except UnusableReply as error:
            return str(error)
        return None

    async def _ask(
        self, messages: Sequence[Message], sampling: Sampling, seeds: Sequence[int | None], schema: JsonSchema | None
    ) -> list[Reply]:
        """One reply per seed: from one call where the policy can, what is missing then from a call each.

        The first call that fails ends the others.
        """
        shared: list[Reply] = []
        try:
            if self.settings.share_prompt:
                n = len(seeds)
                shared = await self.policy.complete_many(messages, sampling, n, seed=seeds[0], schema=schema)
            async with asyncio.TaskGroup() as group:
                calls = [
                    group.create_task(self.policy.complete(messages, sampling, seed=seed, schema=schema))
                    for seed in seeds[len(shared) :]
                ]
        except* SotopiaRLError as failures:
            first = failures.exceptions[0]
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise policy_error(first) from None
        return [*shared, *(call.result() for call in calls)]


_STATUS: dict[FailureKind, tuple[int, str]] = {
    "connection": (503, "policy_unavailable"),
    "http_5xx": (503, "policy_unavailable"),
    "cancelled": (503, "policy_unavailable"),
    "rate_limited": (429, "policy_busy"),
    "timeout": (504, "policy_timeout"),
}
"""What a client is told of a failed call; any other kind is 502, the policy's answer being useless."""


def policy_error(error: BaseException) -> AnswerError:
    """A failed call to the policy as an answer."""
    if isinstance(error, ContextLengthError):
        return AnswerError(f"policy: {error}", status=400, code="context_length_exceeded")
    known = _STATUS.get(error.kind) if isinstance(error, ModelCallError) else None
    status, code = known or (502, "policy_refused")
    return AnswerError(f"policy: {error}", status=status, code=code)


def candidate_seed(seed: int | None, index: int) -> int | None:
    """Sampling seed of a candidate, below 2^31: no two requests with different seeds share one but by chance."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _none_valid(distinct: dict[tuple[str, str | None], int]) -> str:
    problems: Counter[str] = Counter()
    for (_, problem), count in distinct.items():
        problems[str(problem)] += count
    told = [f"{_times(count)}: {problem}" for problem, count in problems.most_common(_PROBLEMS_TOLD)]
    if rest := sum(count for _, count in problems.most_common()[_PROBLEMS_TOLD:]):
        told.append(f"{_times(rest)}: other problems")
    return f"none of the policy's {problems.total()} replies is valid; {'; '.join(told)}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
