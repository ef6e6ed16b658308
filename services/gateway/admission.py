"""How many requests the gateway works on at the same time. More are refused before any work is done."""

from collections.abc import Iterator
from contextlib import contextmanager

from services.core.errors import Overloaded
from services.gateway.metrics import GatewayMetrics


class Admission:
    def __init__(self, inflight_max: int, metrics: GatewayMetrics) -> None:
        self._inflight_max = inflight_max
        self._inflight = 0
        self._gauge = metrics.inflight

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the places. Raises Overloaded when all are taken."""
        if self._inflight >= self._inflight_max:
            raise Overloaded("The server has as many requests as it can take. Try again in a moment.")
        self._inflight += 1
        self._gauge.set(self._inflight)
        try:
            yield
        finally:
            self._inflight -= 1
            self._gauge.set(self._inflight)
