"""From a model's reply to a validated object: one tolerant extractor, strict validation, bounded re-asking.

Tolerant about wrapping (fences, lead-in text, `<think>` blocks, small syntax slips), strict about
content: an incomplete or ambiguous reply is refused and asked for again with what was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import ValidationError

from sotopia_rl import __version__
from sotopia_rl.episode import Provenance, Sampling, Usage, sha256_text
from sotopia_rl.errors import ModelCallError, ReplyError
from sotopia_rl.llm.extract import UnusableReply, extract_json
from sotopia_rl.models import ChatModel, JsonSchema, Message, Reply

__all__ = ["Answer", "UnusableReply", "ask", "extract_json"]

T = TypeVar("T")
_NO_USAGE = Usage()


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A parsed reply and what it took.

    `text` is the reply that was accepted, `prompt` the first prompt, `usage` the sum over all attempts.
    """

    value: T
    text: str
    prompt: str
    attempts: int
    usage: Usage

    def provenance(self, model: ChatModel, sampling: Sampling, prompt_profile: str) -> Provenance:
        """The record kept with whatever is made of this answer."""
        return Provenance(
            model=model.name,
            sampling=sampling,
            prompt_profile=prompt_profile,
            prompt_sha256=sha256_text(self.prompt),
            attempts=self.attempts,
            usage=self.usage,
            package_version=__version__,
        )


async def ask(
    model: ChatModel,
    prompt: str,
    parse: Callable[[str], T],
    *,
    sampling: Sampling,
    seed: int | None = None,
    schema: JsonSchema | None = None,
    max_attempts: int = 3,
) -> Answer[T]:
    """Ask `prompt` as one user message until `parse` accepts the reply.

    Args:
        parse: Raises `UnusableReply` (or any ValueError) with what is wrong.
        seed: Of the first attempt; each further attempt adds one.

    Raises:
        ReplyError: No attempt gave a usable reply.
        ModelCallError: The model gave no reply at all.
    """
    first = Message(role="user", content=prompt)
    messages: Sequence[Message] = [first]
    usage, replies, problem = _NO_USAGE, [], ""
    for attempt in range(max_attempts):
        attempt_seed = None if seed is None else seed + attempt
        try:
            reply = await model.complete(messages, sampling, seed=attempt_seed, schema=schema)
        except ModelCallError as error:
            error.usage = usage if attempt else None
            raise
        usage = usage + reply.usage if attempt else reply.usage
        replies.append(reply.text)
        try:
            value = _parsed(reply, parse, sampling)
        except ValueError as error:
            problem = _in_words(error)
            messages = _ask_again(first, reply.text, problem)
            continue
        return Answer(value=value, text=reply.text, prompt=prompt, attempts=attempt + 1, usage=usage)
    refused = ReplyError(
        f"{model.name}: no usable reply in {max_attempts} attempts; the last: {problem}",
        model=model.name,
        replies=tuple(replies),
    )
    refused.usage = usage
    raise refused


def _parsed(reply: Reply, parse: Callable[[str], T], sampling: Sampling) -> T:
    if reply.finish_reason == "length":
        # Even where the text reads well: what is missing cannot be known.
        raise UnusableReply(f"it was cut off at the token limit of {sampling.max_tokens} tokens; be shorter")
    return parse(reply.text)


def _in_words(error: ValueError) -> str:
    """One line; pydantic's own text has several and a link."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'reply'}: {e['msg']}" for e in error.errors())


def _ask_again(first: Message, reply: str, problem: str) -> list[Message]:
    note = f"That reply cannot be used: {problem}\nPlease reply again."
    if not reply.strip():  # several servers refuse an empty assistant message
        return [Message(role="user", content=f"{first.content}\n\n{note}")]
    return [first, Message(role="assistant", content=reply), Message(role="user", content=note)]
