"""A gateway on asyncio's own event loop, with the time of every callback; takes the arguments of `diptych`.

At its end it says how many took longer than SLOW_S, and the slowest of each kind. Debug mode would say the
same about a gateway that is several times slower.
"""

import asyncio
import sys
import time
from asyncio import events
from collections import Counter

import uvloop

from services.launch.cli import main

SLOW_S = 0.01
slowest: dict[str, float] = {}
slow: Counter[str] = Counter()
counted = 0


def timed(run):
    def _run(self: events.Handle) -> None:
        global counted
        name, begun = describe(self._callback), time.perf_counter()
        run(self)
        took = time.perf_counter() - begun
        counted += 1
        if took > slowest.get(name, 0.0):
            slowest[name] = took
        slow[name] += took > SLOW_S

    return _run


def describe(callback: object) -> str:
    """The coroutine of a task's step, or the function."""
    task = getattr(callback, "__self__", None)
    if isinstance(task, asyncio.Task):
        return getattr(task.get_coro(), "__qualname__", "task")
    return getattr(callback, "__qualname__", type(callback).__name__)


if __name__ == "__main__":
    events.Handle._run = timed(events.Handle._run)  # type: ignore[method-assign]
    uvloop.run = asyncio.run
    code = main(sys.argv[1:])
    print(
        f"{counted:,} callbacks, {sum(slow.values())} of them longer than {SLOW_S * 1e3:.0f} ms",
        file=sys.stderr,
    )
    for name, took in sorted(slowest.items(), key=lambda item: -item[1])[:8]:
        print(f"  slowest callback of {name}: {took * 1e3:.1f} ms ({slow[name]} slow)", file=sys.stderr)
    sys.exit(code)
