"""Tasks that do not outlive a block of code."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# Before Python 3.12, asyncio.wait_for (which the Redis client uses) loses a cancellation that comes in
# the same turn of the loop as its result. Such a task goes on as if nothing had been, so it is told again.
CANCEL_AGAIN_S = 0.05


class ChildTasks:
    """`async with ChildTasks() as tasks:` cancels and awaits, at its end, whatever it started.

    asyncio.TaskGroup cannot serve an async generator that yields inside the block: it turns
    GeneratorExit into an exception group, and a failing child cancels whichever code happens to run
    between two yields (PEP 789). So a child here reports its failure by itself, through a queue or
    its result, and only the block decides when all end.
    """

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def __aenter__(self) -> "ChildTasks":
        return self

    async def __aexit__(self, *_: object) -> None:
        pending = {task for task in self._tasks if not task.done()}
        while pending:
            for task in pending:
                task.cancel()
            pending = (await asyncio.wait(pending, timeout=CANCEL_AGAIN_S))[1]
