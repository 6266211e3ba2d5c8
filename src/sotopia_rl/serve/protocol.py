"""Bodies of the best-of-N server: the part of OpenAI's chat protocol that it speaks, and its own additions.

A field that is not here is refused rather than ignored: an answer that silently leaves out what was asked for is
worse than none.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from sotopia_rl.models import JsonSchema, Message

MAX_MESSAGES = 1024


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


TokenLimit = Annotated[int, Field(gt=0, le=1_000_000), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(_whole)]
Count = Annotated[int, Field(gt=0, le=1024), BeforeValidator(_whole)]
Text = Annotated[str, Field(max_length=1_000_000)]


class RequestBody(BaseModel):
    """What clients send: no unknown fields, and nothing converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(RequestBody):
    type: Literal["text"]
    text: Text


class ChatMessage(RequestBody):
    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def message(self) -> Message:
        """With the parts of its text put together."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=content)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class NamedSchema(RequestBody):
    name: str
    json_schema: JsonSchema = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None

    @field_validator("json_schema")
    @classmethod
    def _can_be_sent_on(cls, schema: JsonSchema) -> JsonSchema:
        try:
            json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise ValueError("holds NaN, Infinity, half of a surrogate pair, or is nested too deeply") from None
        return schema


class TextFormat(RequestBody):
    type: Literal["text"]


class SchemaFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(RequestBody):
    include_usage: bool = False


class ChatRequest(RequestBody):
    """`POST /v1/chat/completions`."""

    model: str
    messages: Messages
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    n: Count = 1
    """The n best candidates are returned, all different."""
    seed: Seed | None = None
    response_format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    best_of: Count | None = None
    """Candidates for this request; by default the server's own number, or `n` where that is more."""
    return_scores: bool = False
    """Add all candidates with their scores as `best_of_n`."""

    @property
    def schema_of_reply(self) -> JsonSchema | None:
        wish = self.response_format
        return wish.json_schema.json_schema if isinstance(wish, SchemaFormat) else None


class ScoreItem(RequestBody):
    messages: Messages
    """What the policy was given."""
    completion: Text
    """What it replied."""


class ScoreRequest(RequestBody):
    """`POST /v1/score`."""

    model: str | None = None
    items: Annotated[list[ScoreItem], Field(min_length=1, max_length=1024)]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop"] = "stop"


class Tokens(BaseModel):
    """Of all the candidates together: what the policy was really asked to do."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ScoredCandidate(BaseModel):
    text: str
    count: int
    """How often the policy said so."""
    score: float | None
    """Null where the reply is not valid."""
    outputs: dict[str, float] | None
    """The reward model's outputs by name."""
    problem: str | None
    """Why it is not valid."""


class BestOfNDetails(BaseModel):
    candidates: int
    """Replies of the policy."""
    valid: int
    """Those that were valid."""
    replies: list[ScoredCandidate]
    """Distinct ones, the best first."""


class ChatResponse(BaseModel):
    id: str = Field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatChoice]
    usage: Tokens
    best_of_n: BestOfNDetails | None = None


class Score(BaseModel):
    index: int
    score: float | None
    """Null where the completion is not valid."""
    outputs: dict[str, float] | None
    problem: str | None


class ScoreResponse(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Score]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sotopia-rl"] = "sotopia-rl"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthState(BaseModel):
    status: Literal["ok"] = "ok"
    policy: str
    """The policy's model string."""
    policy_trouble: str | None
    """Why the last call to it failed; null while calls succeed."""
    requests: int
    """Under way."""


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    if status in {401, 403}:
        kind: Any = "authentication_error"
    elif status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorBody(error=ErrorDetail(message=message, type=kind, code=code, param=param)).model_dump()
