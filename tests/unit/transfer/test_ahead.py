"""`ahead` changes when values are asked for, and nothing else."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from services.transfer.ahead import ahead, until_done


class Values:
    """1, 2, 3, and then an error if there is one; remembers what was asked for and that it was closed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[int] = []
        self.closed = False
        self._error = error

    async def give(self) -> AsyncGenerator[int, None]:
        try:
            for value in (1, 2, 3):
                self.asked.append(value)
                await asyncio.sleep(0)
                yield value
            if self._error:
                raise self._error
        finally:
            self.closed = True


async def test_all_values_come_in_order_and_each_is_asked_for_before_its_turn() -> None:
    values, seen = Values(), []
    async with aclosing(ahead(values.give())) as coming:
        async for value in coming:
            await asyncio.sleep(0.001)
            assert values.asked[-1] == min(value + 1, 3)
            seen.append(value)
    assert seen == [1, 2, 3]


async def test_an_error_is_raised_after_the_values_before_it() -> None:
    seen: list[int] = []

    async def collect() -> None:
        async for value in ahead(Values(ValueError("the end")).give()):
            seen.append(value)

    with pytest.raises(ValueError, match="the end"):
        await collect()
    assert seen == [1, 2, 3]


async def test_closing_it_ends_what_it_has_asked_for() -> None:
    values = Values()
    async with aclosing(ahead(values.give())) as coming:
        async for _ in coming:
            break
    assert values.closed
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_waiting_for_an_end_outlasts_cancellations() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(until_done(future))
    for _ in range(3):
        await asyncio.sleep(0)
        waiting.cancel()
    await asyncio.sleep(0.001)
    assert not waiting.done()
    future.set_exception(ValueError("of no interest"))
    with pytest.raises(asyncio.CancelledError):
        await waiting
