"""Many slow calls at once: the limit, lazy intake, and what stops a run."""

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sotopia_rl.episode import Failure
from sotopia_rl.errors import BudgetError, EndpointDownError, ModelCallError
from sotopia_rl.work import bounded, failure_of

DOWN = ModelCallError("m: HTTP 500", model="m", kind="http_5xx")


async def collected(items, work, *, limit):
    return [pair async for pair in bounded(items, work, limit=limit)]


def noting(taken, count=100):
    """Numbers, each noted when it is taken."""
    for number in range(count):
        taken.append(number)
        yield number


async def echo(item):
    await asyncio.sleep(0)
    return item


@settings(max_examples=30)
@given(st.integers(0, 20), st.integers(1, 8))
def test_every_item_is_worked_on_once_and_never_more_than_the_limit_at_once(count, limit):
    at_once = most = 0

    async def work(item):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return item * item

    done = asyncio.run(collected(range(count), work, limit=limit))
    assert sorted(done) == [(n, n * n) for n in range(count)]
    assert most == min(count, limit)


def test_items_are_taken_only_as_room_appears():
    taken = []

    async def one():
        async with aclosing(bounded(noting(taken), echo, limit=3)) as results:
            await anext(results)
            return len(taken)

    assert asyncio.run(one()) == 3


def test_a_result_is_yielded_while_others_are_still_under_way():
    async def work(item):
        await asyncio.sleep(60 * item)
        return item

    async def first():
        async with aclosing(bounded([1, 0], work, limit=2)) as results:
            return await anext(results)

    assert asyncio.run(asyncio.wait_for(first(), 10)) == (0, 0)


def test_a_failed_call_is_the_failure_of_its_item_alone():
    async def work(item):
        if item == 1:
            raise DOWN
        return item

    done = dict(asyncio.run(collected(range(3), work, limit=2)))
    assert done == {0: 0, 1: Failure(kind="http_5xx", message="m: HTTP 500"), 2: 2}


@pytest.mark.parametrize(
    "stop", [BudgetError("spent", model="m"), EndpointDownError("gone", model="m", kind="connection")]
)
def test_a_spent_budget_or_a_dead_endpoint_stops_the_intake_and_lets_the_rest_end(stop):
    taken = []

    async def work(item):
        if item == 2:
            raise stop
        await asyncio.sleep(0.01)
        return item

    done = dict(asyncio.run(collected(noting(taken), work, limit=4)))
    assert taken == [0, 1, 2, 3]
    assert done == {0: 0, 1: 1, 2: failure_of(stop), 3: 3}


def test_a_bug_stops_everything_and_keeps_its_type():
    ended = []

    async def work(item):
        if item == 0:
            await asyncio.sleep(0.01)
            raise KeyError("a bug")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(item)

    with pytest.raises(KeyError, match="a bug"):
        asyncio.run(collected(range(5), work, limit=3))
    assert sorted(ended) == [1, 2]


def test_cancelling_the_consumer_cancels_what_is_in_flight():
    ended = []

    async def work(item):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(item)

    async def run():
        task = asyncio.create_task(collected(range(9), work, limit=4))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_failure_record_keeps_kind_message_and_turn():
    assert failure_of(DOWN, turn=4) == Failure(kind="http_5xx", message="m: HTTP 500", turn=4)
