"""The supervisor: waits until parts are ready, restarts those that die, forever and ever slower."""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from services.core.errors import WorkerLost
from services.launch.child import Child, ChildSpec
from services.launch.supervisor import (
    LONG_LIFE_SECONDS,
    RESTART_DELAY_SECONDS,
    RESTART_DELAY_SECONDS_MAX,
    keep_running,
    start_until_ready,
)

FOREVER = "import time; print('up', flush=True); time.sleep(1000)"


class SkippingClock:
    """Sleeps take no real time, and are remembered."""

    def __init__(self) -> None:
        self.time = 0.0
        self.sleeps: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


class ShortLived:
    """A part whose lives last as long as the script says; the last one never ends."""

    name = "part"

    def __init__(self, clock: SkippingClock, lives_s: list[float], failing_starts: int = 0) -> None:
        self.clock = clock
        self.lives_s = lives_s
        self.failing_starts = failing_starts

    def start(self) -> None:
        if self.failing_starts:
            self.failing_starts -= 1
            raise OSError("no room")

    async def is_ready(self) -> bool:
        return True

    async def wait(self) -> int:
        if not self.lives_s:
            await asyncio.Event().wait()
        self.clock.time += self.lives_s.pop(0)
        return 1

    def log_tail(self) -> str:
        return ""


def python(name: str, code: str, log: Path) -> Child:
    """A child that is ready when it has said so."""

    async def is_ready() -> bool:
        return "up" in child.log_tail()

    child = Child(ChildSpec(name, (sys.executable, "-c", code), log=log), is_ready)
    return child


async def run_until_settled(part: ShortLived, clock: SkippingClock) -> list[str]:
    """Keep `part` running until its last life; what was reported."""
    lines: list[str] = []
    keeping = asyncio.create_task(keep_running(part, lines.append, clock))
    for _ in range(1000):
        await asyncio.sleep(0)
    keeping.cancel()
    with suppress(asyncio.CancelledError):
        await keeping
    return lines


async def test_a_killed_child_is_reported_and_restarted(tmp_path: Path) -> None:
    child = python("prefill-0", FOREVER, tmp_path / "log")
    await start_until_ready(child, timeout_s=30)
    first = child.pid
    assert first is not None
    lines: asyncio.Queue[str] = asyncio.Queue()
    keeping = asyncio.create_task(keep_running(child, lines.put_nowait, SkippingClock()))
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(30):
        assert await lines.get() == "prefill-0 exited with code -9; restarting"
        assert await lines.get() == "prefill-0 is ready again"
    assert child.pid not in (None, first)
    keeping.cancel()
    await child.stop()


async def test_restart_delays_double_up_to_a_bound() -> None:
    clock = SkippingClock()
    lines = await run_until_settled(ShortLived(clock, [1.0] * 9), clock)
    doubled = [RESTART_DELAY_SECONDS * 2**n for n in range(9)]
    assert clock.sleeps == [min(delay, RESTART_DELAY_SECONDS_MAX) for delay in doubled]
    assert lines.count("part exited with code 1; restarting") == 9


async def test_a_long_life_forgives_earlier_short_ones() -> None:
    clock = SkippingClock()
    await run_until_settled(ShortLived(clock, [1.0, 1.0, LONG_LIFE_SECONDS, 1.0]), clock)
    d = RESTART_DELAY_SECONDS
    assert clock.sleeps == [d, 2 * d, d, 2 * d]


async def test_a_restart_that_fails_is_reported_and_tried_again() -> None:
    clock = SkippingClock()
    lines = await run_until_settled(ShortLived(clock, [1.0], failing_starts=2), clock)
    assert lines == [
        "part exited with code 1; restarting",
        "part cannot be started, trying again: no room",
        "part cannot be started, trying again: no room",
        "part is ready again",
    ]


async def test_a_child_that_ends_at_start_shows_its_last_words(tmp_path: Path) -> None:
    child = python("decode-0", "import sys; sys.exit('no such model')", tmp_path / "log")
    with pytest.raises(WorkerLost, match=r"(?s)decode-0 exited with code 1 at start.*no such model"):
        await start_until_ready(child, timeout_s=30)


async def test_a_child_that_does_not_get_ready_shows_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("loading\n")
    child = python("decode-0", "import time; time.sleep(1000)", tmp_path / "log")
    with pytest.raises(WorkerLost, match=r"decode-0 was not ready after 0 s; its last lines were:\nloading"):
        await start_until_ready(child, timeout_s=0.2)
    await child.stop()


async def test_a_cancelled_start_leaves_a_child_that_can_be_stopped(tmp_path: Path) -> None:
    child = python("decode-0", "import time; time.sleep(1000)", tmp_path / "log")
    starting = asyncio.create_task(start_until_ready(child, timeout_s=1000))
    await asyncio.sleep(0.2)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert child.pid is not None
    await child.stop()
    assert child.pid is None
