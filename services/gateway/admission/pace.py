"""How fast the queue moves while somebody waits in it, in all and by class, and how late first tokens come.

Told of every change of the queue, before (`count`) and after (`note_waiting`), and of whoever leaves it with
a place. What goes through an empty queue says nothing about how fast a full one moves, and is not counted.
"""

from collections.abc import Iterable

from services.core.clock import Clock
from services.gateway.admission.fair_queue import Priority
from services.gateway.admission.forecast import Correction, Throughput


class Pace:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._all = Throughput()
        self._of_class = {priority: Throughput() for priority in Priority}
        self._correction = Correction()
        self._counted_until = clock.now()
        self._waiting: frozenset[Priority] = (
            frozenset()
        )  # the classes in which somebody has waited since then

    def count(self) -> None:
        """The time that has passed since the last change."""
        now = self._clock.now()
        seconds, self._counted_until = now - self._counted_until, now
        if self._waiting:
            self._all.note_wait(seconds)
        for priority in self._waiting:
            self._of_class[priority].note_wait(seconds)

    def note_waiting(self, priorities: Iterable[Priority]) -> None:
        """In which classes somebody waits from now on."""
        self._waiting = frozenset(priorities)

    def note_place(self, priority: Priority, tokens: int, *, others_wait: bool) -> None:
        """One of so many tokens has got a place."""
        if self._waiting or others_wait:
            self._all.note_leave(tokens)
            self._of_class[priority].note_leave(tokens)

    def note_first_token(self, expected_ms: float, seen_ms: float) -> None:
        """How long after its place its first token has come."""
        self._correction.note(expected_ms, seen_ms)

    def tokens_per_s(self, predicted: float) -> float:
        """`predicted` counts before anything was seen."""
        return self._all.per_second(predicted)

    def tokens_per_s_of(self, priority: Priority, predicted: float) -> float:
        return self._of_class[priority].per_second(self.tokens_per_s(predicted))

    def first_token_s(self, expected_ms: float) -> float:
        """How long after its place a first token comes that the router expects after `expected_ms`."""
        return expected_ms / 1e3 * self._correction.factor
