"""Scoring of replies by a reward model, batched over whoever is waiting.

A reward model here is blocking code with two methods; `Batcher` makes it serve many tasks at once. Each method has a
thread, so that a batch grows while the one before it is scored. No torch here: the model in this process is in
`reward_model.py`, the one on a vLLM server below.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, Self

from sotopia_rl.errors import ServingError
from sotopia_rl.models import Message
from sotopia_rl.serve.together import Together
from sotopia_rl.serve.vllm import post_json
from sotopia_rl.train.data import Tokenizer, completions_token_ids, prompts_token_ids

Scores = tuple[float, ...]
"""One number per output of the reward model, 0..1 if it was trained here."""
Ids = tuple[int, ...]
Asked = tuple[Sequence[Message], Sequence[str]]
"""A prompt and replies to it."""
Encoded = tuple[Ids, Ids]
"""A prompt's token ids and a reply's; replies to one prompt have equal prompts."""


_MAX_READ = 1024


class TooLongError(ServingError):
    """A prompt and reply that the reward model has no room for: the caller's to shorten, not a failure of ours."""


class RewardModel(Protocol):
    """Scores token ids; `outputs` names the numbers it gives. Both methods block, each in its own thread."""

    outputs: tuple[str, ...]

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and a reply together."""
        ...

    def encode(self, requests: Sequence[Asked]) -> list[list[Encoded]]:
        """One pair per reply. Raises `TooLongError` where one is too long, or a prompt leaves no room for a reply."""
        ...

    def score(self, pairs: Sequence[Encoded]) -> list[Scores]:
        """Scores at each reply's last token. Raises `ServingError` where the model cannot be had."""
        ...


@dataclass(frozen=True, eq=False)
class ChatEncoder:
    """Token ids as in training: the chat template's up to the reply, the reply's, one end token.

    Raises `TooLongError` where they are more than `max_length`: a reward model sees the end of a reply or nothing.
    """

    tokenizer: Tokenizer
    max_length: int
    _read: dict[tuple[Message, ...], Ids] = field(default_factory=dict, init=False)
    """Ids of prompts that came without replies: these follow, once the policy has given them."""

    def __call__(self, requests: Sequence[Asked]) -> list[list[Encoded]]:
        """All texts are tokenised together, which takes less time than one by one, and equal prompts once."""
        prompts = self._prompts(list(dict.fromkeys(tuple(prompt) for prompt, _ in requests)))
        replies = iter(completions_token_ids(self.tokenizer, [text for _, texts in requests for text in texts]))
        encoded = [
            self._fitting(prompts[tuple(prompt)], list(islice(replies, len(texts)))) for prompt, texts in requests
        ]
        for prompt, texts in requests:
            if not texts:
                self._keep(tuple(prompt), prompts[tuple(prompt)])
        return encoded

    def _prompts(self, prompts: Sequence[tuple[Message, ...]]) -> dict[tuple[Message, ...], Ids]:
        found = {prompt: self._read.pop(prompt) for prompt in prompts if prompt in self._read}
        if new := [prompt for prompt in prompts if prompt not in found]:
            found.update(zip(new, map(tuple, prompts_token_ids(self.tokenizer, new)), strict=True))
        return found

    def _keep(self, prompt: tuple[Message, ...], ids: Ids) -> None:
        self._read[prompt] = ids
        if len(self._read) > _MAX_READ:  # the policy gave nothing
            del self._read[next(iter(self._read))]

    def _fitting(self, prompt: Ids, replies: Sequence[list[int]]) -> list[Encoded]:
        shortest_reply = 2  # a token and the end
        longest = len(prompt) + max(map(len, replies), default=shortest_reply)
        if longest > self.max_length:
            raise TooLongError(
                f"prompt and reply have {'' if replies else 'at least '}{longest} tokens, the prompt alone "
                f"{len(prompt)}; the reward model takes {self.max_length}"
            )
        return [(prompt, tuple(reply)) for reply in replies]


@dataclass(eq=False)
class PoolingServer:
    """A reward model on a vLLM pooling server (`serve vllm --task reward`); the tokenizer is here, ids are sent.

    Attributes:
        url: Of the server, `/v1` included.
        name: What the server calls the reward adapter.
    """

    url: str
    name: str
    encoder: ChatEncoder
    outputs: tuple[str, ...]
    timeout_seconds: float = 60.0

    @property
    def max_length(self) -> int:
        return self.encoder.max_length

    def encode(self, requests: Sequence[Asked]) -> list[list[Encoded]]:
        return self.encoder(requests)

    def score(self, pairs: Sequence[Encoded]) -> list[Scores]:
        body = {"model": self.name, "input": [[*prompt, *reply] for prompt, reply in pairs], "use_activation": False}
        answer = post_json(self.url.removesuffix("/v1"), "pooling", body, self.timeout_seconds)
        try:
            by_index: dict[int, list[float]] = {int(entry["index"]): entry["data"] for entry in answer["data"]}
            return [tuple(map(float, by_index[index])) for index in range(len(pairs))]
        except (KeyError, TypeError, ValueError):
            raise ServingError(f"{self.url}: the answer of /pooling holds no scores; is it a pooling server?") from None


class Batcher:
    """Scores replies for many tasks, those that wait together: while a batch is scored, the next is tokenised.

    async with Batcher(model) as scorer:
        scores = await scorer.score(prompt, replies)
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        max_batch: int = 256,
        wait_seconds: float = 0.002,
        observe: Callable[[int, float], None] = lambda _replies, _seconds: None,
    ) -> None:
        """Nothing is started before the `async with`.

        Args:
            max_batch: Replies in one batch; requests are not divided, so one request may exceed it.
            wait_seconds: How long a batch that is not full waits for more, after a time when nothing waited.
            observe: Told, in the model's thread and after each batch, failed ones included, how many replies it held
                and the seconds it took.
        """
        self.model = model
        self._observe = observe
        self._encoder = Together(
            "reward model's tokenizer", self._encode, size=lambda asked: len(asked[1]), max_size=max_batch
        )
        self._scorer = Together("reward model", self._score, size=len, max_size=max_batch, wait_seconds=wait_seconds)

    @property
    def depth(self) -> int:
        """Replies that wait for a batch."""
        return self._encoder.depth + self._scorer.depth

    async def score(self, prompt: Sequence[Message], replies: Sequence[str]) -> list[Scores]:
        """Scores of replies to one prompt, in order; without a reply, whether the prompt leaves room for one.

        Raises:
            TooLongError: The reward model has no room for them.
            ServingError: It cannot be had, gave something that is no number, or the batcher is closed.
        """
        pairs = await self._encoder((prompt, replies))
        return await self._scorer(pairs) if pairs else []

    async def __aenter__(self) -> Self:
        await self._encoder.__aenter__()
        await self._scorer.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._scorer.__aexit__(*exc)
        await self._encoder.__aexit__(*exc)

    def _encode(self, batch: Sequence[Asked]) -> Sequence[list[Encoded] | Exception]:
        """Together; where that fails, each alone, so that the error is that of the request that makes it."""
        try:
            return self.model.encode(batch)
        except Exception as error:  # noqa: BLE001 - carried over to the task that waits
            return [error] if len(batch) == 1 else [part for asked in batch for part in self._encode([asked])]

    def _score(self, batch: Sequence[list[Encoded]]) -> Sequence[list[Scores] | Exception]:
        start = time.perf_counter()
        results = self._results(batch)
        self._observe(sum(map(len, batch)), time.perf_counter() - start)
        return results

    def _results(self, batch: Sequence[list[Encoded]]) -> Sequence[list[Scores] | Exception]:
        """What is equal is scored once."""
        distinct = list(dict.fromkeys(pair for pairs in batch for pair in pairs))
        try:
            found = dict(zip(distinct, self.model.score(distinct), strict=True))
        except Exception as error:  # noqa: BLE001 - carried over to the tasks that wait
            return [error] * len(batch)
        if not all(math.isfinite(number) for scores in found.values() for number in scores):
            return [ServingError("the reward model gave something that is no number")] * len(batch)
        return [[found[pair] for pair in pairs] for pairs in batch]
