"""From a model string to a model: the one place where the kinds are told apart.

openai/gpt-4o                     OpenAI, key from OPENAI_API_KEY
custom/NAME@http://host:port/v1   any OpenAI-compatible server, key from SOTOPIA_RL_KEY_HOST_PORT
local/PATH[:ADAPTER]              transformers, in this process
vllm/PATH[:ADAPTER]               vLLM, started for the run
scripted/NAME                     a deterministic model that ships with the package
"""

from __future__ import annotations

import asyncio
import difflib
import gc
import importlib.util
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar
from urllib.parse import urlsplit

from sotopia_rl.errors import ConfigError, MissingExtraError
from sotopia_rl.llm.folders import check_adapter, check_model_folder
from sotopia_rl.llm.limits import Budget, ModelLimits, Tally
from sotopia_rl.llm.prices import price_of
from sotopia_rl.models import ChatModel

if TYPE_CHECKING:  # aiohttp and torch are imported when a model needs them: `--help` needs neither
    from sotopia_rl.llm.endpoint import Endpoint
    from sotopia_rl.llm.in_process import LocalBase
    from sotopia_rl.serve.model import ServedBase

T = TypeVar("T")

OPENAI_KEY = "OPENAI_API_KEY"
FORMS = "openai/NAME, custom/NAME@http://host:port/v1, local/PATH[:ADAPTER], vllm/PATH[:ADAPTER] or scripted/NAME"

_CUSTOM = re.compile(r"(?P<name>.+)@(?P<url>https?://.+)")


@dataclass(frozen=True)
class OpenAIName:
    name: str


@dataclass(frozen=True)
class CustomName:
    name: str
    url: str
    """Without a slash at the end."""


@dataclass(frozen=True)
class LocalName:
    path: Path
    adapter: Path | None


@dataclass(frozen=True)
class VLLMName:
    path: Path
    adapter: Path | None


@dataclass(frozen=True)
class ScriptedName:
    name: str


def parse_name(text: str) -> OpenAIName | CustomName | LocalName | VLLMName | ScriptedName:
    """What a model string names; nothing is opened or looked up.

    Raises:
        ConfigError: The string has none of these forms.
    """
    kind, _, rest = text.partition("/")
    if not rest or text != text.strip():
        raise ConfigError(f"{text!r} names no model; write {FORMS}")
    if kind == "openai":
        return OpenAIName(rest)
    if kind == "scripted":
        return ScriptedName(rest)
    if kind == "local":
        return LocalName(*_folders(rest))
    if kind == "vllm":
        return VLLMName(*_folders(rest))
    if kind == "custom":
        return _parse_custom(text, rest)
    near = difflib.get_close_matches(kind, ["openai", "custom", "local", "vllm", "scripted"], n=1)
    hint = f", did you mean {near[0]}/{rest}?" if near else f"; write {FORMS}"
    raise ConfigError(f"{text!r} names no model: unknown kind {kind!r}{hint}")


def _parse_custom(text: str, rest: str) -> CustomName:
    match = _CUSTOM.fullmatch(rest)
    if match is None:
        raise ConfigError(f"{text!r} names no endpoint; write custom/NAME@http://host:port/v1")
    url = match["url"].rstrip("/")
    if "@" in url or "?" in url or "#" in url:
        # The text is not repeated: what stands there is most likely a key.
        raise ConfigError(
            f"custom/{match['name']}: the URL holds a user, a password or a query; write http://host:port/v1 "
            "and put the key into the environment"
        )
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{text!r}: {url} is not a URL; write http://host:port/v1")
    return CustomName(match["name"], url)


def _folders(rest: str) -> tuple[Path, Path | None]:
    """PATH and ADAPTER."""
    if Path(rest).is_dir():  # a folder whose name holds a colon
        return Path(rest), None
    path, colon, adapter = rest.rpartition(":")
    return (Path(path), Path(adapter)) if colon and path and adapter else (Path(rest), None)


class ModelPool:
    """The models of one run: each string opened once, limits and budget shared, all closed at the end.

    async with ModelPool(limits) as pool:
        model = pool.get("openai/gpt-4o")
    """

    def __init__(self, limits: ModelLimits | None = None, *, budget: Budget | None = None) -> None:
        self.limits = limits or ModelLimits()
        self.budget = budget or Budget(self.limits.max_spend_usd)
        self._models: dict[str, ChatModel] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._bases: dict[Path, LocalBase] = {}
        self._served: dict[Path, ServedBase] = {}

    def get(self, name: str) -> ChatModel:
        """The model that `name` names, opened on first use; connections and weights come with its first call.

        Raises:
            ConfigError: The string is wrong, its key or price is missing, or its folder is no model.
            MissingExtraError: It needs an optional dependency.
        """
        if name not in self._models:
            self._models[name] = self._open(name)
        return self._models[name]

    def open(self, names: Iterable[str]) -> None:
        """Open models before the first is asked, so that a wrong string is found in time. Errors as `get`."""
        for name in names:
            self.get(name)

    def add(self, model: ChatModel) -> None:
        """Make an open model known under its own name; the pool closes it with the others."""
        self._models[model.name] = model

    def tallies(self) -> dict[str, Tally]:
        """Calls, tokens and cost by model string, failed calls included. Scripted models keep none."""
        found = {name: getattr(model, "tally", None) for name, model in self._models.items()}
        return {name: tally for name, tally in found.items() if isinstance(tally, Tally)}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for model in self._models.values():
            await model.__aexit__(*exc)
        self._models.clear()
        self._endpoints.clear()
        self._bases.clear()
        self._served.clear()

    def _open(self, name: str) -> ChatModel:
        parsed = parse_name(name)
        if isinstance(parsed, ScriptedName):
            return _scripted(parsed)
        if isinstance(parsed, LocalName):
            return self._local(name, parsed)
        if isinstance(parsed, VLLMName):
            return self._vllm(name, parsed)
        return self._http(name, parsed)

    def _http(self, name: str, parsed: OpenAIName | CustomName) -> ChatModel:
        from sotopia_rl.llm.client import HttpModel
        from sotopia_rl.llm.endpoint import OPENAI_URL

        price = price_of(name, self.limits.prices)
        if price is None and self.limits.max_spend_usd is not None:
            raise ConfigError(
                f"{name}: its price is not known, which a spend cap needs; give it under prices "
                "(USD per million prompt and completion tokens; [0, 0] for a server of your own)"
            )
        endpoint = self._endpoint(OPENAI_URL if isinstance(parsed, OpenAIName) else parsed.url)
        if isinstance(parsed, OpenAIName):
            if not endpoint.has_key:
                raise ConfigError(f"{name}: no key; set {OPENAI_KEY} in the environment")
            return HttpModel(name, parsed.name, endpoint, self.budget, price, max_tokens_field="max_completion_tokens")
        return HttpModel(name, parsed.name, endpoint, self.budget, price)

    def _endpoint(self, url: str) -> Endpoint:
        from sotopia_rl.llm.endpoint import OPENAI_URL, Endpoint, key_variable

        if url not in self._endpoints:
            variable = OPENAI_KEY if url == OPENAI_URL else key_variable(url)
            self._endpoints[url] = Endpoint(url, self.limits, variable=variable)
        return self._endpoints[url]

    def _local(self, name: str, parsed: LocalName) -> ChatModel:
        path = resolve_model_folder(parsed.path)
        check_model_folder(path, kind="local/")
        if parsed.adapter is not None:
            check_adapter(parsed.adapter, path)
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, "train")
        from sotopia_rl.llm.in_process import LocalBase, LocalModel

        key = path.resolve()
        if key not in self._bases:
            self._bases[key] = LocalBase(path, self.limits)
        return LocalModel(name, self._bases[key], parsed.adapter)

    def _vllm(self, name: str, parsed: VLLMName) -> ChatModel:
        from sotopia_rl.serve.model import ServedBase, ServedModel, vllm_settings

        path = resolve_model_folder(parsed.path)
        key = path.resolve()
        if key not in self._served:
            self._served[key] = ServedBase(path, vllm_settings(self.limits.vllm), self.limits, self.budget)
        return ServedModel(name, self._served[key], self._served[key].add(parsed.adapter))


def resolve_model_folder(path: str | Path) -> Path:
    """A model folder; `smollm2` stands for SmolLM2-135M-Instruct out of its PyPI package."""
    if str(path) != "smollm2" or Path(path).exists():
        return Path(path)
    from sotopia_rl.llm import smollm2

    return smollm2.cached()


def _scripted(parsed: ScriptedName) -> ChatModel:
    from sotopia_rl.sandbox import SCRIPTED

    if parsed.name not in SCRIPTED:
        raise ConfigError(f"scripted/{parsed.name}: no such model{_near(parsed.name, SCRIPTED)}")
    return SCRIPTED[parsed.name]()


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean scripted/{near[0]}?" if near else f"; there are {', '.join(sorted(known))}"


def with_models(limits: ModelLimits, work: Callable[[ModelPool], Awaitable[T]], *, budget: Budget | None = None) -> T:
    """Run `work` to its end with a pool of models, which is closed afterwards; for callers outside any event loop."""

    async def inside() -> T:
        async with ModelPool(limits, budget=budget) as pool:
            return await work(pool)

    with _rarely_collected():
        return asyncio.run(inside())


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """The garbage collector looks after 50,000 new objects, not 700: most of them are records that live on.

    With hundreds of matches at once it would take a tenth to a sixth of the time.
    """
    usual = gc.get_threshold()
    gc.set_threshold(50_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@asynccontextmanager
async def open_model(name: str, limits: ModelLimits | None = None) -> AsyncIterator[ChatModel]:
    """One model on its own: `async with open_model("scripted/fair") as model`.

    Raises:
        ConfigError, MissingExtraError: As `ModelPool.get`.
    """
    async with ModelPool(limits) as pool:
        yield pool.get(name)
