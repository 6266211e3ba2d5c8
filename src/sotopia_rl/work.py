"""Many slow calls at once: bounded, lazily fed, each failure contained.

The one place where a failure of ours becomes a record instead of an exception. Bugs (anything that is
not a `SotopiaRLError`) still stop the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

from sotopia_rl.episode import Failure, Usage
from sotopia_rl.errors import BudgetError, EndpointDownError, ModelCallError

Item = TypeVar("Item")
Result = TypeVar("Result")


def failure_of(error: ModelCallError, *, turn: int | None = None) -> Failure:
    """The record of a failed model call."""
    return Failure(kind=error.kind, message=str(error), turn=turn, usage=error.usage or Usage())


async def bounded(
    items: Iterable[Item],
    work: Callable[[Item], Awaitable[Result]],
    *,
    limit: int,
) -> AsyncGenerator[tuple[Item, Result | Failure], None]:
    """Run `work` on every item, at most `limit` at once; yield each as it finishes.

    Items are taken from the iterable only as room appears, so it may be long and lazy. A `ModelCallError`
    is yielded as a `Failure` of its item; a `BudgetError` and an `EndpointDownError` too, after which no further item
    is started. Who stops early closes the generator (`aclosing`), which cancels what is in flight.

    Raises:
        Exception: Anything else that `work` raises; what is in flight is cancelled first.
    """
    source = iter(items)
    running: dict[asyncio.Future[Result], Item] = {}
    finished: asyncio.Queue[asyncio.Future[Result]] = asyncio.Queue()  # asyncio.wait looks at all that run, each time
    open_for_more = True
    try:
        while True:
            while open_for_more and len(running) < limit:
                try:
                    item = next(source)
                except StopIteration:
                    open_for_more = False
                    break
                started = asyncio.ensure_future(work(item))
                started.add_done_callback(finished.put_nowait)
                running[started] = item
            if not running:
                return
            ended = await finished.get()
            item = running.pop(ended)
            try:
                result: Result | Failure = ended.result()
            except ModelCallError as error:
                open_for_more = open_for_more and not isinstance(error, (BudgetError, EndpointDownError))
                result = failure_of(error)
            yield item, result
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
