"""What a chat model is to this package, and how a string names one.

    openai/gpt-4o                     OpenAI, key from OPENAI_API_KEY
    custom/NAME@http://host:port/v1   any OpenAI-compatible server
    local/PATH[:ADAPTER]              transformers, in this process
    vllm/PATH[:ADAPTER]               vLLM, started for the run
    scripted/NAME                     a deterministic model that ships with the package

Everything that talks does so through `ChatModel.complete`; nothing else is known of a model, but that some can give
many replies to one prompt for one call (`ManyRepliesModel`).
The clients live in `llm/`, the scripted models in `sandbox/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self, TypeGuard

from sotopia_rl.episode import Record, Sampling, Usage

JsonSchema = dict[str, Any]


class Message(Record):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Reply(Record):
    """What a model said, and what the call took."""

    text: str
    usage: Usage = Usage()
    finish_reason: str = "stop"
    """`stop`, or `length` where the reply was cut at `max_tokens`."""


class ChatModel(Protocol):
    """A model that answers a chat.

    `name` is the model string. `complete` raises `ModelCallError` where no reply came. `seed` makes a
    sampled reply repeatable where the model allows it. `schema` asks for JSON of that shape where the
    model can be constrained; a model that cannot ignores it, and the caller validates in any case.
    """

    name: str

    async def complete(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        seed: int | None = None,
        schema: JsonSchema | None = None,
    ) -> Reply: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...


class ManyRepliesModel(ChatModel, Protocol):
    """A model that can reply many times to one prompt, which it then reads once.

    `gives_many` is False once its server has shown that it gives one reply whatever it is asked.
    """

    gives_many: bool

    async def complete_many(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        n: int,
        *,
        seed: int | None = None,
        schema: JsonSchema | None = None,
    ) -> list[Reply]:
        """Between 1 and n replies from one call; what is missing is the caller's to ask for.

        The first carries the usage of the whole call, the others none. Raises as `complete`.
        """
        ...


def gives_many(model: ChatModel) -> TypeGuard[ManyRepliesModel]:
    """Whether a model can be asked for many replies in one call."""
    return bool(getattr(model, "gives_many", False))
