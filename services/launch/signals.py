"""Ctrl-C and SIGTERM for commands that own processes: they cancel the command, whose `finally`
blocks stop what it started. A second signal cancels that too, and everything is killed at once."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_until_signal(command: Coroutine[Any, Any, T]) -> T:
    """Run `command` to its end. Raises asyncio.CancelledError when a signal ended it."""
    return asyncio.run(_cancelled_by_signals(command))


async def _cancelled_by_signals(command: Coroutine[Any, Any, T]) -> T:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    return await command
