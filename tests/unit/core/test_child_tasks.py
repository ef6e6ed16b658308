"""Tasks of a block end with the block, whatever way it is left."""

import asyncio
from contextlib import aclosing

import pytest

from services.core.child_tasks import ChildTasks


class Child:
    """A task that waits for ever, and ignores its first `deaf` cancellations."""

    def __init__(self, deaf: int = 0) -> None:
        self.deaf, self.ended = deaf, False

    async def run(self) -> None:
        try:
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.deaf -= 1
                    if self.deaf < 0:
                        raise
        finally:
            self.ended = True


@pytest.mark.parametrize("deaf", [0, 2])
async def test_leaving_the_block_ends_its_tasks(deaf: int) -> None:
    children = [Child(), Child(deaf)]
    async with ChildTasks() as tasks:
        for child in children:
            tasks.start(child.run())
        await asyncio.sleep(0)
    assert all(child.ended for child in children)


async def test_an_error_in_the_block_ends_its_tasks_and_is_raised() -> None:
    child = Child()

    async def failing_block() -> None:
        async with ChildTasks() as tasks:
            tasks.start(child.run())
            await asyncio.sleep(0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing_block()
    assert child.ended


async def test_closing_a_generator_that_yields_inside_the_block_ends_its_tasks() -> None:
    child = Child()

    async def numbers():
        async with ChildTasks() as tasks:
            tasks.start(child.run())
            await asyncio.sleep(0)
            yield 1

    async with aclosing(numbers()) as running:
        assert await anext(running) == 1
        assert not child.ended
    assert child.ended


async def test_a_finished_task_keeps_its_result() -> None:
    async def seven() -> int:
        return 7

    async with ChildTasks() as tasks:
        task = tasks.start(seven())
        await asyncio.sleep(0)
    assert task.result() == 7


async def test_a_failing_task_does_not_disturb_the_block() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async with ChildTasks() as tasks:
        task = tasks.start(fail())
        await asyncio.sleep(0)
    assert isinstance(task.exception(), ZeroDivisionError)
