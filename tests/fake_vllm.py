"""A local server with vLLM's manners, over real HTTP: adapters loaded at run time, token ids and probabilities.

    with FakeVLLM(faults=["500", "fewer"]) as server:
        ... server.url ...

Each request for completions takes the next fault of the list; after the last one all is well. What it samples is up
to `sample`; by default every completion is the token 7 and the end token.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from local_server import LocalServer

EOS = 2
Sample = Callable[[Path, list[int], dict[str, Any]], tuple[list[int], list[float]]]
"""(adapter folder, prompt ids, request) -> token ids, their log-probabilities."""


def canned(adapter: Path, prompt: list[int], request: dict[str, Any]) -> tuple[list[int], list[float]]:
    return [7, EOS], [-0.5, -0.25]


def _each(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda answer: [change(choice) for choice in answer["choices"]]


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "fewer": lambda answer: answer["choices"].pop(),
    "none": lambda answer: answer.update(choices=[]),
    "no-choices": lambda answer: answer.pop("choices"),
    "other-model": lambda answer: answer.update(model="base"),
    "empty": _each(lambda choice: choice.update(token_ids=[], logprobs={"token_logprobs": []})),
    "no-ids": _each(lambda choice: choice.pop("token_ids")),
    "unknown-ids": _each(lambda choice: choice.update(token_ids=[10**6, EOS])),
    "text-ids": _each(lambda choice: choice.update(token_ids=["7", EOS])),
    "other-prompt": _each(lambda choice: choice.update(prompt_token_ids=[1])),
    "no-logprobs": _each(lambda choice: choice.update(logprobs=None)),
    "few-logprobs": _each(lambda choice: choice["logprobs"]["token_logprobs"].pop()),
    "null-logprobs": _each(lambda choice: choice["logprobs"].update(token_logprobs=[None, None])),
    "broken-off": _each(lambda choice: choice.update(finish_reason="length")),
    "aborted": _each(lambda choice: choice.update(finish_reason="abort")),
}
"""What can be wrong with an answer; `FakeVLLM` knows some faults beside these."""


class FakeVLLM(LocalServer):
    def __init__(
        self,
        *,
        sample: Sample = canned,
        faults: Sequence[str] = (),
        max_model_len: int = 4096,
        takes_adapters: bool = True,
        raw_logprobs: bool = False,
    ) -> None:
        self.sample = sample
        self.faults = list(faults)
        self.max_model_len = max_model_len
        self.takes_adapters = takes_adapters
        self.raw_logprobs = raw_logprobs
        self.adapters: dict[str, Path] = {}
        self.loaded: list[str] = []
        """Every name that was ever loaded, in order."""
        self.requests: list[dict[str, Any]] = []
        self.port = 0

    def routes(self) -> list[web.RouteDef]:
        known = [web.get("/v1/models", self._models), web.post("/v1/completions", self._completions)]
        if self.takes_adapters:
            known += [
                web.post("/v1/load_lora_adapter", self._load),
                web.post("/v1/unload_lora_adapter", self._unload),
            ]
        return known

    async def _models(self, request: web.Request) -> web.Response:
        base = {"id": "base", "root": "/base", "max_model_len": self.max_model_len}
        adapters = [{"id": name, "root": str(path), "parent": "base"} for name, path in self.adapters.items()]
        return web.json_response({"object": "list", "data": [base, *adapters]})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        path = Path(body["lora_path"])
        if not (path / "adapter_model.safetensors").is_file():
            return _error(404, f"The lora adapter '{body['lora_name']}' cannot be found at {path}")
        self.adapters[body["lora_name"]] = path
        self.loaded.append(body["lora_name"])
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text="Success")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "restarted":
            self.adapters.clear()
        if fault == "hang":
            await asyncio.sleep(60)
        if fault == "closed":
            request.transport.close()
        if fault.isdigit():
            return _error(int(fault), "EngineCore encountered an issue")
        if fault == "html":
            return web.Response(text="<html>welcome</html>", content_type="text/html")
        if body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        answer = self._answer(body)
        if fault in WRONG:
            WRONG[fault](answer)
        return web.json_response(answer)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        assert not body.get("stream")
        choices = []
        for index in range(body.get("n", 1)):
            ids, logprobs = self.sample(self.adapters[body["model"]], list(body["prompt"]), body)
            tops = -1.0 if self.raw_logprobs else -1.0 / body["temperature"]
            choice = {
                "index": index,
                "text": "",
                "finish_reason": "stop" if ids[-1] == EOS else "length",
                "logprobs": {"token_logprobs": logprobs, "top_logprobs": [{"a": tops}]},
            }
            if body.get("return_token_ids"):
                choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
            choices.append(choice)
        return copy.deepcopy({"model": body["model"], "choices": choices})


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "error", "code": status}}, status=status)
