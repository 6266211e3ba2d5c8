"""`local/PATH[:ADAPTER]`: transformers in this process, requests from many conversations decoded together.

One `LocalBase` per model folder owns the weights and one worker thread; any number of `LocalModel`s, each with
its own LoRA adapter or none, share it. The thread takes what is waiting, groups it by adapter and decodes up to
`max_batch` rows at once. Nothing is loaded before the first request. For serving at scale use vLLM and
`custom/`; this is for tests, small models and single GPUs.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import transformers

from sotopia_rl.episode import Sampling, Usage
from sotopia_rl.errors import ConfigError, ContextLengthError, MissingExtraError, ModelCallError
from sotopia_rl.llm.constraint import SchemaCompiler
from sotopia_rl.llm.decode import Row, decode
from sotopia_rl.llm.folders import check_adapter, check_model_folder, quiet_loading, template_of
from sotopia_rl.llm.limits import ModelLimits, Tally
from sotopia_rl.llm.prefill import PrefixStore, can_prefill
from sotopia_rl.models import JsonSchema, Message, Reply

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 0.002
"""The worker starts a batch once no request has arrived for so long."""


@dataclass(eq=False)
class _Request:
    messages: Sequence[Message]
    sampling: Sampling
    seed: int | None
    schema: JsonSchema | None
    model: str
    adapter: Path | None
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Reply]

    def deliver(self, result: Reply | BaseException) -> None:
        """Hand the result to the waiting task, from the worker's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_settle, self.future, result)


def _settle(future: asyncio.Future[Reply], result: Reply | BaseException) -> None:
    if future.done():  # its task was cancelled
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)


@dataclass(eq=False)
class LocalModel:
    """A `ChatModel` on a shared base, with one adapter or none."""

    name: str
    base: LocalBase
    adapter: Path | None = None
    tally: Tally = field(default_factory=Tally)

    async def complete(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        seed: int | None = None,
        schema: JsonSchema | None = None,
    ) -> Reply:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        self.base.submit(
            _Request(messages, sampling, seed, schema, self.name, self.adapter, loop, future),
        )
        try:
            reply = await future
        except ModelCallError:
            self.tally.failed += 1
            raise
        self.tally.add(reply.usage)
        return reply

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.base.close)


class LocalBase:
    """One model folder: its weights, its adapters, its queue and its thread."""

    def __init__(self, path: Path, limits: ModelLimits) -> None:
        self.path = path
        self.limits = limits
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._waiting: list[_Request] = []
        self._thread: threading.Thread | None = None
        self._loaded: _Loaded | None = None

    @classmethod
    def around(cls, model: Any, tokenizer: Any, path: Path, limits: ModelLimits) -> Self:
        """A base on weights that are loaded already, such as those of a policy in training.

        They must not change, nor be used elsewhere, between the first request and `close`.
        """
        base = cls(path, limits)
        base._loaded = _Loaded.of(path, model, tokenizer, limits)
        return base

    def submit(self, request: _Request) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"local {self.path.name}", daemon=True)
            self._thread.start()
        self._queue.put(request)

    def close(self) -> None:
        """End the thread after the batch it is in, and let the weights go."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self._thread = self._loaded = None

    def _work(self) -> None:
        while self._collect():
            batch = self._next_batch()
            try:
                if self._loaded is None:
                    self._loaded = _Loaded.load(self.path, self.limits)
                self._loaded.run(batch)
            except BaseException as error:  # noqa: BLE001 - carried over to the tasks that wait
                for request in batch:
                    request.deliver(_as_call_error(error, request.model))
        for request in self._waiting:
            request.deliver(ModelCallError(f"{request.model}: closed", model=request.model, kind="cancelled"))
        self._waiting = []

    def _collect(self) -> bool:
        """Wait for work, then for the queue to fall quiet. False when closed."""
        wait: float | None = None if not self._waiting else 0
        while len(self._waiting) < 4 * self.limits.max_batch:
            try:
                request = self._queue.get(timeout=wait) if wait != 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if request is None:
                return False
            self._waiting.append(request)
            wait = _QUIET_SECONDS
        self._waiting = [request for request in self._waiting if not request.future.cancelled()]
        return True

    def _next_batch(self) -> list[_Request]:
        """The oldest request and those that can be decoded with it, oldest first."""
        if not self._waiting:
            return []
        adapter = self._waiting[0].adapter
        batch = [request for request in self._waiting if request.adapter == adapter][: self.limits.max_batch]
        taken = set(map(id, batch))
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        return batch


def _as_call_error(error: BaseException, model: str) -> BaseException:
    """A failure of the device or the model as one of ours; a bug stays what it is."""
    if isinstance(error, torch.OutOfMemoryError):
        return ModelCallError(f"{model}: out of memory; lower max_batch", model=model, kind="model")
    return error


@dataclass
class _Loaded:
    """Weights, tokenizer and adapters of one base."""

    path: Path
    model: Any
    tokenizer: Any
    stop_tokens: frozenset[int]
    schemas: SchemaCompiler
    max_batch_tokens: int
    context: int
    store: PrefixStore | None
    adapters: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, limits: ModelLimits) -> Self:
        device = limits.device if limits.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        check_model_folder(path, kind="local/")
        # bfloat16 is many times slower than float32 on a CPU
        dtype: Any = torch.float32 if device == "cpu" else "auto"
        try:
            with quiet_loading():
                tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
                model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"local/{path}: not a loadable model ({_first_line(error)})") from error
        return cls.of(path, model.to(device).eval(), tokenizer, limits)

    @classmethod
    def of(cls, path: Path, model: Any, tokenizer: Any, limits: ModelLimits) -> Self:
        """Weights that are in memory already."""
        config, stop_tokens = model.config, _stop_tokens(model, tokenizer)
        return cls(
            path=path,
            model=model,
            tokenizer=tokenizer,
            stop_tokens=stop_tokens,
            schemas=SchemaCompiler(tokenizer, config.vocab_size, stop_tokens),
            max_batch_tokens=limits.max_batch_tokens,
            context=getattr(config, "max_position_embeddings", None) or 10**9,
            store=PrefixStore(limits.prefix_megabytes * 10**6) if can_prefill(config) else None,
        )

    def run(self, requests: Sequence[_Request]) -> None:
        """Decode requests that share an adapter, and deliver each as it finishes."""
        rows = [(request, self._row(request)) for request in requests]
        fitting = []
        for request, row in rows:
            if isinstance(row, ModelCallError):
                request.deliver(row)
            else:
                fitting.append((request, row))
        fitting.sort(key=lambda pair: len(pair[1].prompt))  # neighbours of like length need little padding
        with self._adapter(requests[0].adapter) if requests else nullcontext():
            for part in _by_size(fitting, self.max_batch_tokens):
                self._decode(part, owner=str(requests[0].adapter))

    def _decode(self, part: Sequence[tuple[_Request, Row]], *, owner: str) -> None:
        owners = {id(row): request for request, row in part}
        decode(
            self.model,
            [row for _, row in part],
            pad_token=self.tokenizer.pad_token_id or 0,  # masked out everywhere, so any token will do
            stop_tokens=self.stop_tokens,
            done=lambda row: owners[id(row)].deliver(self._reply(row)),
            wanted=lambda row: not owners[id(row)].future.cancelled(),
            store=self.store,
            owner=owner,
        )

    def _row(self, request: _Request) -> Row | ModelCallError:
        prompt = self.tokenizer.apply_chat_template(
            [message.model_dump() for message in request.messages],
            chat_template=self._template(request.adapter),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        room = self.context - len(prompt)
        if room <= 0:
            return ContextLengthError(
                f"{request.model}: the prompt has {len(prompt)} tokens, the model's context is {self.context}",
                model=request.model,
                kind="model",
            )
        return Row(
            prompt=prompt,
            max_new_tokens=min(request.sampling.max_tokens, room),
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            stream=random.Random(request.seed),
            constraint=self.schemas.constraint(request.schema) if request.schema is not None else None,
        )

    def _template(self, adapter: Path | None) -> str:
        """The chat template that an adapter was trained with, or the tokenizer's own."""
        if adapter is not None and (file := template_of(adapter)) is not None:
            return file.read_text(encoding="utf-8")
        if not self.tokenizer.chat_template:
            raise ConfigError(f"local/{self.path}: its tokenizer has no chat template; add chat_template.jinja")
        return str(self.tokenizer.chat_template)

    def _reply(self, row: Row) -> Reply:
        usage = Usage(calls=1, prompt_tokens=len(row.prompt), completion_tokens=len(row.tokens))
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return Reply(text=text, usage=usage, finish_reason=row.finish or "stop")

    def _adapter(self, adapter: Path | None) -> Any:
        """A context in which the model has this adapter, loaded on first use."""
        if adapter is None:
            return self.model.disable_adapter() if self.adapters else nullcontext()
        if adapter not in self.adapters:
            self._load_adapter(adapter)
        self.model.set_adapter(self.adapters[adapter])
        return nullcontext()

    def _load_adapter(self, adapter: Path) -> None:
        try:
            import peft
        except ImportError as error:
            raise MissingExtraError("peft", "train") from error
        recorded = check_adapter(adapter, self.path)
        name = f"adapter_{len(self.adapters)}"
        try:
            if self.adapters:
                self.model.load_adapter(str(adapter), adapter_name=name)
            else:
                self.model = peft.PeftModel.from_pretrained(self.model, str(adapter), adapter_name=name).eval()
        except (RuntimeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"adapter {adapter} was trained on {recorded} and does not fit {self.path} ({_first_line(error)})"
            ) from error
        self.adapters[adapter] = name


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a reply: the model's and the tokenizer's end tokens and ChatML's end of turn."""
    stops: set[int] = set()
    for source in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        stops.update([source] if isinstance(source, int) else source or [])
    if (chatml := tokenizer.get_vocab().get("<|im_end|>")) is not None:
        stops.add(chatml)
    return frozenset(stops)


def _by_size(pairs: Sequence[tuple[_Request, Row]], max_tokens: int) -> list[list[tuple[_Request, Row]]]:
    """Cut a list sorted by prompt length into parts of at most `max_tokens` padded tokens, replies included."""
    parts: list[list[tuple[_Request, Row]]] = []
    for pair in pairs:
        length = len(pair[1].prompt) + pair[1].max_new_tokens
        if not parts or (len(parts[-1]) + 1) * length > max_tokens:
            parts.append([])
        parts[-1].append(pair)
    return parts


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
