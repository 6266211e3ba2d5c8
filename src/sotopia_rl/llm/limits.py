"""What a run may ask of its models: calls at once, calls per minute, time, money; and what it has asked so far."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from sotopia_rl.config import Config
from sotopia_rl.episode import Usage
from sotopia_rl.errors import BudgetError


class ModelLimits(Config):
    """Limits on model calls; the same for every model of a run."""

    timeout_seconds: float = Field(default=120.0, gt=0)
    """Deadline of one HTTP attempt, from sending to the last byte of the body."""
    max_retries: int = Field(default=5, ge=0)
    """Further attempts after a 429, a 5xx, a timeout or a closed connection."""
    max_in_flight: int = Field(default=256, gt=0)
    """Calls at once per HTTP endpoint."""
    max_per_minute: int | None = Field(default=None, gt=0)
    """Calls started per minute and HTTP endpoint, evenly spaced. Empty: no limit."""
    backoff_seconds: float = Field(default=1.0, ge=0)
    """Pause before the first further attempt; it doubles each time, less up to half of it by chance."""
    max_wait_seconds: float = Field(default=60.0, gt=0)
    """Longest pause between two attempts, whatever the server's Retry-After asks."""
    down_after_seconds: float = Field(default=30.0, ge=0)
    """An endpoint that has worked counts as down once nothing but failures came for so long."""
    send_seed: bool = True
    """Send a sampling seed with each call. vLLM 0.32 on CPUs dies of one while it prefills in chunks."""
    max_spend_usd: float | None = Field(default=None, gt=0)
    """Spend cap over all models of the run. Every model called must then have a known price. Empty: no cap."""
    prices: dict[str, tuple[float, float]] = Field(default={})
    """USD per million prompt and completion tokens, by model string or pattern; the flag takes JSON:
    `{"openai/gpt-4o": [2.5, 10], "custom/*@http://gpu1:*": [0, 0]}`."""
    max_batch: int = Field(default=64, gt=0)
    """In-process models: conversations decoded together."""
    max_batch_tokens: int = Field(default=131_072, gt=0)
    """In-process models: tokens decoded together, padding and replies included."""
    prefix_megabytes: int = Field(default=400, ge=0)
    """In-process models: memory for what is known of recent prompts, so that a conversation is not read anew."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """In-process models: where they run."""
    vllm: Path | None = None
    """vllm/ models: YAML file with settings of `serve vllm`, `python` (vLLM's interpreter) among them."""


@dataclass
class Tally:
    """What calls to one model have taken since it was opened, failed ones included."""

    calls: int = 0
    """Answered."""
    failed: int = 0
    """Given up, after every attempt."""
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    cost_known: bool = True
    """False where the model's price is not known: `cost_usd` is then 0 and means nothing."""

    def add(self, usage: Usage) -> None:
        self.calls += usage.calls
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.cost_usd += usage.cost_usd


@dataclass
class Budget:
    """The spend cap of a run, shared by all its models.

    A call is let through only when the dearest it can become, together with the dearest that the calls in
    flight can become, stays under the cap; otherwise it waits for those to end. Prompt lengths are estimated
    before a call, so the cap can be passed by the error of that estimate, not by a call.
    """

    cap_usd: float | None = None
    spent_usd: float = 0.0
    _in_flight_usd: float = 0.0
    _freed: asyncio.Event = field(default_factory=asyncio.Event)

    async def reserve(self, worst_usd: float, *, model: str) -> None:
        """Hold back what the call may cost, waiting while calls in flight may still free it.

        Raises:
            BudgetError: The call does not fit, and nothing in flight could make room for it.
        """
        if self.cap_usd is None:
            return
        while self.spent_usd + self._in_flight_usd + worst_usd > self.cap_usd:
            if self._in_flight_usd <= 0:
                raise BudgetError(
                    f"spend cap reached: {self.spent_usd:.4f} of {self.cap_usd:g} USD spent, and a call to {model} "
                    f"may cost {worst_usd:.4f}; raise max_spend_usd to go on",
                    model=model,
                )
            self._freed.clear()
            await self._freed.wait()
        self._in_flight_usd += worst_usd

    def settle(self, worst_usd: float, cost_usd: float) -> None:
        """End a reserved call that cost `cost_usd`."""
        self.spent_usd += cost_usd
        if self.cap_usd is not None:
            self._in_flight_usd = max(0.0, self._in_flight_usd - worst_usd)
            if self._in_flight_usd < 1e-12:  # rounding must not look like a call in flight
                self._in_flight_usd = 0.0
            self._freed.set()
