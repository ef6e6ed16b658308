"""Keeps the parts of a local cluster running: waits until each is ready, restarts those that die."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn, Protocol

from services.core.clock import Clock
from services.core.errors import DiptychError, WorkerLost

READY_POLL_SECONDS = 0.1
RESTART_DELAY_SECONDS = 0.5  # doubled after each short life
RESTART_DELAY_SECONDS_MAX = 30.0
LONG_LIFE_SECONDS = 60.0  # a part that lived so long is restarted with the first delay again

Report = Callable[[str], None]  # tells one line to the person who started the cluster


class Part(Protocol):
    """Something of the cluster that runs as a process."""

    @property
    def name(self) -> str: ...

    def start(self) -> None: ...

    def is_ready(self) -> Awaitable[bool]: ...

    async def wait(self) -> int:
        """Wait for the end; the exit code, -N when signal N ended it."""
        ...

    def log_tail(self) -> str: ...


async def start_until_ready(part: Part, timeout_s: float) -> None:
    """Start the part and wait until it is ready.

    Raises WorkerLost, with the part's last words, when it ends before or does not get ready in time.
    """
    part.start()
    ended = asyncio.create_task(part.wait())
    try:
        async with asyncio.timeout(timeout_s):
            while not ended.done() and not await part.is_ready():
                await asyncio.wait([ended], timeout=READY_POLL_SECONDS)
    except TimeoutError:
        raise WorkerLost(f"{part.name} was not ready after {timeout_s:.0f} s{_last_words(part)}") from None
    finally:
        ended.cancel()
    if ended.done() and not ended.cancelled():
        raise WorkerLost(f"{part.name} exited with code {ended.result()} at start{_last_words(part)}")


async def keep_running(part: Part, report: Report, clock: Clock) -> NoReturn:
    """Restart the running `part` whenever it dies, forever, with a growing delay."""
    delay, started = RESTART_DELAY_SECONDS, clock.now()
    life = part.wait()
    while True:
        code = await life
        if clock.now() - started >= LONG_LIFE_SECONDS:
            delay = RESTART_DELAY_SECONDS
        report(f"{part.name} exited with code {code}; restarting")
        await clock.sleep(delay)
        delay = min(2 * delay, RESTART_DELAY_SECONDS_MAX)
        started = clock.now()
        await _start_again(part, report, clock)
        life = _live(part, report, clock)


async def _start_again(part: Part, report: Report, clock: Clock) -> None:
    while True:
        try:
            return part.start()
        except (OSError, DiptychError) as error:
            report(f"{part.name} cannot be started, trying again: {error}")
            await clock.sleep(RESTART_DELAY_SECONDS_MAX)


async def _live(part: Part, report: Report, clock: Clock) -> int:
    """Wait for the end of a restarted part, and report when it is ready again."""
    announcement = asyncio.create_task(_announce_ready(part, report, clock))
    try:
        return await part.wait()
    finally:
        announcement.cancel()


async def _announce_ready(part: Part, report: Report, clock: Clock) -> None:
    while not await part.is_ready():
        await clock.sleep(READY_POLL_SECONDS)
    report(f"{part.name} is ready again")


def _last_words(part: Part) -> str:
    tail = part.log_tail()
    return f"; its last lines were:\n{tail}" if tail else ""
