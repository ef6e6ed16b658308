"""Work that this gateway has sent to workers and that their reports may not show yet.

Without it, all requests of a burst would be routed by the same old snapshot and pile on one worker.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from router.state import Route, WorkerView
from services.core.clock import Clock

# A worker reports at least every 250 ms and the gateway reads every 100 ms: after this time a
# report includes the work, and counting it twice would only make the worker look busier than it is.
REPORT_DELAY_S = 0.4


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    worker_id: str
    at: float
    prefill_tokens: int
    sequences: int  # that will decode
    blocks: int


class InFlight:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sent: dict[str, list[Sent]] = {}  # by worker id

    @contextmanager
    def sent(self, route: Route, known_tokens: int, choices: int) -> Iterator[None]:
        """Count the parts of `route` from now until the block ends."""
        parts = [self._part(route, index, known_tokens, choices) for index in range(len(route.chosen))]
        for part in parts:
            self._sent.setdefault(part.worker_id, []).append(part)
        try:
            yield
        finally:
            for part in parts:
                self._sent[part.worker_id].remove(part)
                if not self._sent[part.worker_id]:
                    del self._sent[part.worker_id]

    def added_to(self, view: WorkerView, *, reports_arrive: bool) -> WorkerView:
        """`view` with our unreported work. When no reports arrive, all unfinished work counts."""
        since = self._clock.now() - REPORT_DELAY_S
        sent = [s for s in self._sent.get(view.id, ()) if s.at > since or not reports_arrive]
        return replace(
            view,
            queued_prefill_tokens=view.queued_prefill_tokens + sum(s.prefill_tokens for s in sent),
            running=view.running + sum(s.sequences for s in sent),
            blocks_available=max(0, view.blocks_available - sum(s.blocks for s in sent)),
        )

    def _part(self, route: Route, index: int, known_tokens: int, choices: int) -> Sent:
        offer = route.chosen[index]
        return Sent(
            worker_id=offer.worker.id,
            at=self._clock.now(),
            prefill_tokens=known_tokens - offer.ready_tokens if offer.part != "decode" else 0,
            sequences=choices if offer.part != "prefill" else 0,
            blocks=-(-known_tokens // offer.worker.block_size) + (choices if offer.part != "prefill" else 1),
        )
