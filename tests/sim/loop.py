"""An event loop in which a whole cluster runs on virtual time, repeatable from a seed.

Time stands still while anything is ready to run and then jumps to the next timer, so hours take
seconds. Whatever is ready at the same moment runs in an order that the seed decides: a race that can
happen is found by some seed, and found again by the same one.

Operating system processes are told apart by a context variable, which tasks and callbacks inherit.
One can be stopped (nothing of it runs, all is kept for later), continued, or killed.
"""

import asyncio
import contextvars
import heapq
import random
from collections.abc import Callable, Coroutine
from typing import Any

_TURNS_WITHOUT_TIME_MAX = 200_000  # more callbacks at one moment than that are a loop that never waits

_process: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


class Stuck(Exception):
    """Nothing can ever run again, or something runs for ever without waiting."""


class _Numbered:
    """Hashed by its number: sets of tasks would else be in the order of memory addresses."""

    number: int

    def __hash__(self) -> int:
        return self.number


class SimTask(_Numbered, asyncio.Task):  # type: ignore[type-arg]
    def __init__(self, loop: "VirtualLoop", coro: Coroutine[Any, Any, Any], context=None, **kw) -> None:
        self.number = loop.next_number()
        self.process = context.get(_process) if context is not None else _process.get()
        super().__init__(coro, loop=loop, context=context, **kw)


class _SimFuture(_Numbered, asyncio.Future):  # type: ignore[type-arg]
    def __init__(self, loop: "VirtualLoop") -> None:
        self.number = loop.next_number()
        super().__init__(loop=loop)


class VirtualLoop(asyncio.BaseEventLoop):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(f"order of callbacks {seed}")
        self._now = 0.0
        self._numbers = 0
        self._turns_without_time = 0
        self.set_task_factory(SimTask)

    def time(self) -> float:
        return self._now

    def create_future(self) -> asyncio.Future[Any]:
        return _SimFuture(self)

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _run_once(self) -> None:
        """One turn: what asyncio does, with a clock that jumps instead of a selector that waits."""
        self._wake_due()
        batch = list(self._ready)
        self._ready.clear()
        if len(batch) > 1:
            self._rng.shuffle(batch)
        self._turns_without_time += len(batch)
        if self._turns_without_time > _TURNS_WITHOUT_TIME_MAX:
            raise Stuck(f"time stands still at {self._now:.3f} s: something runs without ever waiting")
        for handle in batch:
            if handle._cancelled:
                continue
            process = handle._context.get(_process)
            if process is not None and process.stopped:
                process.backlog.append(handle)
            else:
                handle._run()

    def _wake_due(self) -> None:
        timers = self._scheduled
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not self._ready and not self._stopping:
            if not timers:
                raise Stuck(f"nothing can ever happen after {self._now:.3f} s")
            if timers[0]._when > self._now:
                self._now = timers[0]._when
                self._turns_without_time = 0
        while timers and timers[0]._when <= self._now:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            self._ready.append(timer)

    def _write_to_self(self) -> None:
        """There is no other thread to wake up from."""


class Process:
    """What lives and dies together: the tasks and callbacks of one process of the operating system."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self._loop = loop
        self.name = name
        self.stopped = False
        self.dead = False
        self.backlog: list[asyncio.Handle] = []  # what would have run while it was stopped
        self.context = contextvars.copy_context()
        self.context.run(_process.set, self)

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return self._loop.create_task(work, context=self.context.copy())

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: object) -> None:
        """Run `callback` as part of this process. Unlike tasks, it may still come after its death."""
        self._loop.call_later(delay_s, callback, *args, context=self.context)

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped = False
        for handle in self.backlog:
            self._loop._ready.append(handle)
        self.backlog = []

    def kill(self) -> None:
        """SIGKILL. Its tasks are cancelled to get rid of them; whatever they do at that, the world outside
        (network, store, engine) takes nothing from a dead process any more."""
        self.dead = True
        for task in self.tasks():
            task.cancel()
        self.resume()

    def tasks(self) -> "list[SimTask]":
        """Those that have not ended, oldest first."""
        tasks = [task for task in asyncio.all_tasks(self._loop) if getattr(task, "process", None) is self]
        return sorted(tasks, key=lambda task: task.number)


def current_process() -> Process | None:
    return _process.get()


class LoopClock:
    """Implements Clock on the loop's virtual time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
