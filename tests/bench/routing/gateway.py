"""A simulated gateway: the production view of the cluster, in-flight work and router, on virtual time."""

import itertools
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import heappop, heappush

from router.route import route
from router.state import Route, RouteOptions, RouteRequest
from services.core.worker_report import WorkerReport
from services.gateway.cluster.cluster_view import ClusterView
from services.gateway.cluster.expected_cache import Noted
from services.gateway.cluster.in_flight import Part
from services.gateway.workers.worker_client import OutputToken
from tests.bench.routing.timeline import Timeline, immediate
from tests.bench.routing.worker import MODEL, Store

REFRESH_S = 0.1  # as GatewayConfig.membership_poll_s
PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 0.3  # between two looks for room


class _NoConnections:
    """Of the gateway's client to workers the view needs only this."""

    async def keep_only(self, live: Collection[WorkerReport]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Placed:
    """A route, counted as in flight until `in_flight` is closed. `expected` is told how it goes on."""

    route: Route
    in_flight: ExitStack
    computing: Part
    expected: Noted

    def token(self, token: OutputToken) -> None:
        self.computing.prefilled()
        self.expected.see(token)


class Gateway:
    def __init__(self, store: Store, options: RouteOptions, timeline: Timeline, rng: random.Random) -> None:
        self._timeline, self._options, self._rng = timeline, options, rng
        self._numbers = itertools.count()
        self._line: list[tuple[int, Callable[[], None]]] = []  # who waits for room, a heap: the oldest first
        self._view = ClusterView(store.membership, store.index, _NoConnections(), timeline, MODEL)  # type: ignore[arg-type]

    def start(self, phase_s: float) -> None:
        immediate(self._view.refresh())
        self._timeline.after(phase_s, self._refresh)

    def place(self, seq_id: str, known_ids: Sequence[int], max_tokens: int) -> Placed | None:
        """As services.gateway.path.pipeline does it."""
        view = self._view
        located = immediate(view.locate(known_ids, ""))
        request = RouteRequest(
            prompt_tokens=len(known_ids), max_tokens=max_tokens, number=next(self._numbers)
        )
        views = view.worker_views()
        chosen = route(request, located.cached, views, self._options, self._rng, located.coming)
        if chosen is None:
            return None
        in_flight = ExitStack()
        computing = in_flight.enter_context(view.in_flight.sent(chosen, seq_id, len(known_ids), 1))
        holders = [view.report(name) if name else None for name in (chosen.prefill, chosen.decode)]
        expected = in_flight.enter_context(view.expecting(*holders, known_ids, ""))
        return Placed(chosen, in_flight, computing, expected)

    @property
    def has_line(self) -> bool:
        return bool(self._line)

    def wait(self, number: int, look: Callable[[], None]) -> None:
        """Call `look` when the turn comes to the request of that number: the oldest first."""
        if not self._line:
            self._timeline.after(self._pause_s(), self._next_looks)
        heappush(self._line, (number, look))

    def _next_looks(self) -> None:
        _, look = heappop(self._line)
        if self._line:
            self._timeline.after(self._pause_s(), self._next_looks)
        look()

    def _pause_s(self) -> float:
        return self._rng.uniform(PAUSE_MIN_S, PAUSE_MAX_S)

    def _refresh(self) -> None:
        immediate(self._view.refresh())
        self._timeline.after(REFRESH_S, self._refresh)
