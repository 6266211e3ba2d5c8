"""The best-of-N server: OpenAI's chat protocol in front of `best_of_n.py`.

/v1/chat/completions  one reply, or the n best; streamed on request, once it is chosen
/v1/score             scores of utterances
/v1/models            what there is
/healthz, /metrics    for whoever runs it; no key needed
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sotopia_rl import __version__
from sotopia_rl.episode import Sampling, Usage
from sotopia_rl.serve.best_of_n import AnswerError, BestOfN, BestOfNSettings, Candidate, Choice
from sotopia_rl.serve.guard import RETRY_AFTER, Guard, Metrics
from sotopia_rl.serve.protocol import (
    AssistantMessage,
    BestOfNDetails,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    ErrorBody,
    HealthState,
    ModelCard,
    ModelList,
    Score,
    ScoredCandidate,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    Tokens,
    error_body,
)

logger = logging.getLogger(__name__)

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is wrong, or too long for the reward model or the policy", "model": ErrorBody},
    401: {"description": "The API key is missing or wrong", "model": ErrorBody},
    404: {"description": "There is no such model", "model": ErrorBody},
    413: {"description": "The body is too long", "model": ErrorBody},
    415: {"description": "The body is not application/json", "model": ErrorBody},
    429: {"description": "Too many requests at once; see Retry-After", "model": ErrorBody},
    500: {"description": "A bug; the server's log says more", "model": ErrorBody},
    502: {"description": "No valid candidate, or a useless answer of the policy", "model": ErrorBody},
    503: {"description": "The policy or the reward model cannot be had; see Retry-After", "model": ErrorBody},
    504: {"description": "The policy did not answer in time", "model": ErrorBody},
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def build_app(chooser: BestOfN, metrics: Metrics, *, key: str | None = None) -> FastAPI:
    """The server as an ASGI application; the chooser is entered when it starts and left when it ends.

    Args:
        key: What clients must send as a bearer token; None lets everybody in.
    """
    settings = chooser.settings
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with chooser:
            yield

    about: dict[str, Any] = {"title": "sotopia-rl best-of-N", "version": __version__}
    app = _App(settings, **about, lifespan=lifespan, docs_url=None, redoc_url=None)
    guard: dict[str, Any] = {"key": key, "max_requests": settings.max_requests, "max_bytes": settings.max_request_bytes}
    app.add_middleware(Guard, metrics=metrics, **guard)
    _answer_errors(app)
    metrics.waiting.set_function(lambda: chooser.scorer.depth)
    metrics.policy_up.set_function(lambda: float(chooser.policy.trouble is None))

    def check_model(name: str | None) -> None:
        if name not in {None, settings.served_name}:
            message = f"there is no model {name!r}, only {settings.served_name!r}"
            raise AnswerError(message, status=404, code="model_not_found")

    @app.post("/v1/chat/completions", responses=_ERRORS | _STREAM, response_model=ChatResponse)
    async def chat_completions(request: ChatRequest) -> Any:
        check_model(request.model)
        choice = await _choose(chooser, request)
        _count(metrics, choice)
        answer = _answer(request, choice, settings.served_name, chooser.scorer.model.outputs)
        if request.stream:
            usage = bool(request.stream_options and request.stream_options.include_usage)
            return Response("".join(_events(answer, include_usage=usage)), media_type="text/event-stream")
        return answer

    @app.post("/v1/score", responses={code: _ERRORS[code] for code in _ERRORS if code not in {502, 504}})
    async def score(request: ScoreRequest) -> ScoreResponse:
        check_model(request.model)
        return ScoreResponse(model=settings.served_name, data=await _scores(chooser, request.items))

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=settings.served_name, created=started)])

    @app.get("/healthz")
    async def healthz() -> HealthState:
        policy = chooser.policy
        return HealthState(policy=policy.name, policy_trouble=policy.trouble, requests=metrics.under_way)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def show_metrics() -> Response:
        text = prometheus_client.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


async def _choose(chooser: BestOfN, request: ChatRequest) -> Choice:
    settings = chooser.settings
    candidates = request.best_of or max(settings.candidates, request.n)
    temperature = settings.temperature if request.temperature is None else request.temperature
    if candidates > settings.max_candidates:
        raise _wrong(f"{candidates} candidates are above this server's limit of {settings.max_candidates}")
    if request.n > candidates:
        raise _wrong(f"n {request.n} is above best_of {candidates}")
    if request.n > 1 and temperature == 0:
        raise _wrong(f"n {request.n} at temperature 0: a greedy policy has only one reply")
    sampling = Sampling(
        temperature=temperature,
        top_p=request.top_p,
        max_tokens=request.max_completion_tokens or request.max_tokens or settings.max_tokens,
    )
    choice = await chooser.choose(
        [message.message() for message in request.messages],
        sampling,
        n=candidates,
        seed=request.seed,
        schema=request.schema_of_reply,
    )
    if len(choice.valid) < request.n:
        message = f"the {candidates} candidates hold {len(choice.valid)} different valid replies, {request.n} are asked"
        raise AnswerError(message, status=502, code="too_few_valid_candidates")
    return choice


def _wrong(message: str) -> AnswerError:
    return AnswerError(message, status=400, code="invalid_request")


def _answer(request: ChatRequest, choice: Choice, model: str, outputs: Sequence[str]) -> ChatResponse:
    best = choice.valid[: request.n]
    return ChatResponse(
        model=model,
        choices=[ChatChoice(index=i, message=AssistantMessage(content=c.text)) for i, c in enumerate(best)],
        usage=_tokens(choice.usage),
        best_of_n=_details(choice, outputs) if request.return_scores else None,
    )


def _tokens(usage: Usage) -> Tokens:
    return Tokens(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _details(choice: Choice, outputs: Sequence[str]) -> BestOfNDetails:
    return BestOfNDetails(
        candidates=sum(candidate.count for candidate in choice.candidates),
        valid=sum(candidate.count for candidate in choice.valid),
        replies=[_scored(candidate, outputs) for candidate in choice.candidates],
    )


def _scored(candidate: Candidate, outputs: Sequence[str]) -> ScoredCandidate:
    named = dict(zip(outputs, candidate.outputs, strict=True)) if candidate.problem is None else None
    return ScoredCandidate(
        text=candidate.text, count=candidate.count, score=candidate.score, outputs=named, problem=candidate.problem
    )


async def _scores(chooser: BestOfN, items: Sequence[ScoreItem]) -> list[Score]:
    """Scores item by item, all in the same batches; an invalid completion gets its problem instead."""
    return await asyncio.gather(*(_score(chooser, index, item) for index, item in enumerate(items)))


async def _score(chooser: BestOfN, index: int, item: ScoreItem) -> Score:
    if (problem := chooser.problem_of(item.completion)) is not None:
        return Score(index=index, score=None, outputs=None, problem=problem)
    messages = [message.message() for message in item.messages]
    ((outputs, score),) = await chooser.score(messages, [item.completion])
    named = dict(zip(chooser.scorer.model.outputs, outputs, strict=True))
    return Score(index=index, score=score, outputs=named, problem=None)


def _count(metrics: Metrics, choice: Choice) -> None:
    valid = sum(candidate.count for candidate in choice.valid)
    metrics.candidates.labels("valid").inc(valid)
    metrics.candidates.labels("invalid").inc(sum(candidate.count for candidate in choice.candidates) - valid)
    metrics.candidates.labels("duplicate").inc(valid - len(choice.valid))
    metrics.tokens.labels("prompt").inc(choice.usage.prompt_tokens)
    metrics.tokens.labels("completion").inc(choice.usage.completion_tokens)


def _events(answer: ChatResponse, *, include_usage: bool) -> Iterator[str]:
    """The answer as server-sent events. Nothing can be streamed before the choice is made."""
    head = {"id": answer.id, "object": "chat.completion.chunk", "created": answer.created, "model": answer.model}
    for choice in answer.choices:
        delta = {"role": "assistant", "content": choice.message.content}
        yield _event(head | {"choices": [{"index": choice.index, "delta": delta, "finish_reason": None}]})
        yield _event(head | {"choices": [{"index": choice.index, "delta": {}, "finish_reason": choice.finish_reason}]})
    if answer.best_of_n is not None:
        yield _event(head | {"choices": [], "best_of_n": answer.best_of_n.model_dump()})
    if include_usage:
        yield _event(head | {"choices": [], "usage": answer.usage.model_dump()})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _answer_errors(app: FastAPI) -> None:
    """Every error as a body that OpenAI's clients understand; a traceback goes to the log only."""

    @app.exception_handler(AnswerError)
    async def no_answer(_: Request, error: AnswerError) -> JSONResponse:
        headers = RETRY_AFTER if error.status in {429, 503} else None
        return JSONResponse(error_body(error.status, str(error), error.code), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        not_json = first["type"] == "json_invalid"
        place = "" if not_json else ".".join(str(part) for part in first["loc"][1:])
        message = "the body is not JSON" if not_json else f"{place or 'body'}: {first['msg']}"
        return JSONResponse(error_body(400, message, "invalid_request", place or None), 400)

    @app.exception_handler(HTTPException)
    async def no_such_thing(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return JSONResponse(error_body(error.status_code, error.detail, code), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        message = f"internal error ({type(error).__name__}); the server's log says more"
        return JSONResponse(error_body(500, message, "internal_error"), 500)


class _App(FastAPI):
    """Its OpenAPI schema says what this server takes, and is made when somebody asks for it."""

    def __init__(self, settings: BestOfNSettings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _document(super().openapi(), self._settings)
        return super().openapi()


def _document(schema: dict[str, Any], settings: BestOfNSettings) -> None:
    """Say what this server takes, and take FastAPI's own 422 out: here it is 400."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    parts = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    fields = parts["ChatRequest"]["properties"]
    fields["model"]["enum"] = [settings.served_name]
    fields["n"]["maximum"] = fields["best_of"]["anyOf"][0]["maximum"] = settings.max_candidates
    parts["ScoreRequest"]["properties"]["model"]["anyOf"][0]["enum"] = [settings.served_name]
