"""Blocking work that many tasks ask for, done together: whatever waits becomes one batch, in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from sotopia_rl.errors import ServingError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Together(Generic[Item, Result]):
    """async with Together("reward model", work, size=len, max_size=256) as together: result = await together(item)"""

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        size: Callable[[Item], int],
        max_size: int,
        wait_seconds: float = 0.0,
    ) -> None:
        """Nothing is started before the `async with`.

        Args:
            name: Of what works, for errors.
            work: From a batch to what each item of it gets: a result, or an error that its task is told. It blocks, and
                is always called from the same thread.
            max_size: Of a batch; items are not divided, so one item may exceed it.
            wait_seconds: How long a batch that is not full waits for more, after a time when nothing waited.
        """
        self.name = name
        self._work = work
        self._size = size
        self._max_size = max_size
        self._wait_seconds = wait_seconds
        self._waiting: list[_Waiting[Item, Result]] = []
        self._in_work: list[_Waiting[Item, Result]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._worker: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Size of what waits for a batch."""
        return sum(self._size(waiting.item) for waiting in self._waiting)

    async def __call__(self, item: Item) -> Result:
        """What `work` makes of an item.

        Raises:
            ServingError: It is not running, or ends before it comes to this item.
            Exception: The one that `work` gives for this item.
        """
        if self._worker is None or self._worker.done():
            raise ServingError(f"the {self.name} is not running")
        waiting = _Waiting[Item, Result](item, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.future

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._worker is not None, "not entered"
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        for waiting in (*self._in_work, *self._waiting):
            waiting.fail(ServingError("the server is shutting down"))
        self._thread.shutdown()

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            if self._wait_seconds and self.depth < self._max_size:
                await asyncio.sleep(self._wait_seconds)
            done = self._start()
            while done is not None:
                batch, results = self._in_work, await done
                done = self._start()  # first: to give results out keeps the loop busy, and the thread would idle
                for waiting, result in zip(batch, results, strict=True):
                    if isinstance(result, Exception):
                        waiting.fail(result)
                    elif not waiting.future.done():
                        waiting.future.set_result(result)

    def _start(self) -> asyncio.Future[Sequence[Result | Exception]] | None:
        """Have the next batch worked on, unless nothing waits."""
        self._in_work = self._next_batch()
        if not self._in_work:
            return None
        items = [waiting.item for waiting in self._in_work]
        return asyncio.get_running_loop().run_in_executor(self._thread, self._work, items)

    def _next_batch(self) -> list[_Waiting[Item, Result]]:
        """The oldest items that somebody still waits for, as many as fit."""
        alive = [waiting for waiting in self._waiting if not waiting.future.done()]
        batch: list[_Waiting[Item, Result]] = []
        size = 0
        for waiting in alive:
            size += self._size(waiting.item)
            if batch and size > self._max_size:
                break
            batch.append(waiting)
        self._waiting = alive[len(batch) :]
        if not self._waiting:
            self._arrived.clear()
        return batch
