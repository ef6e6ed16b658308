"""Virtual time: a heap of what happens next. Nothing waits; a run takes as long as its events compute."""

from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from typing import Any, TypeVar

T = TypeVar("T")


class Timeline:
    """A Clock whose time jumps from event to event; of those at the same moment, first come first served."""

    def __init__(self) -> None:
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._scheduled = 0

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing sleeps here: events are scheduled with `after`")

    def at(self, when_s: float, event: Callable[..., None], *arguments: Any) -> None:
        self._scheduled += 1
        heappush(self._events, (max(when_s, self._now), self._scheduled, event, arguments))

    def after(self, seconds: float, event: Callable[..., None], *arguments: Any) -> None:
        self.at(self._now + seconds, event, *arguments)

    def run(self, *, until: Callable[[], bool], limit_s: float) -> None:
        """Let events happen until the condition holds. Raises AssertionError beyond the limit of time."""
        while not until():
            assert self._events, "nothing is left to happen"
            self._now, _, event, arguments = heappop(self._events)
            assert self._now <= limit_s, f"still not done after {limit_s:.0f} s of virtual time"
            event(*arguments)


def immediate(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, as those of the in-memory twins."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise AssertionError("a coroutine waited that was believed not to")
