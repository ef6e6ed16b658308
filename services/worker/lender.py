"""Has the engine keep cached blocks for a reader on another worker: between a loan's lease and the engine."""

from collections.abc import Sequence

from services.core.clock import Clock
from services.core.errors import from_label
from services.engine.handle import EngineHandle, Event, Stalled
from services.engine.messages import Admitted, Lend, Refused
from services.transfer.lease import Lease, LeaseTable


class Lender:
    def __init__(self, engine: EngineHandle, leases: LeaseTable, clock: Clock) -> None:
        self._engine, self._leases, self._clock = engine, leases, clock

    def lend(self, lease: Lease, token_ids: Sequence[int], salt: str) -> None:
        """Raises Overloaded, EngineFailed or EngineStalled; what goes wrong later fails the lease."""
        order = Lend(lease.transfer_id, list(token_ids), salt)
        self._engine.submit(order, lambda event: self._on_event(lease, event))

    def _on_event(self, lease: Lease, event: Event) -> None:
        match event:
            case Admitted():
                lease.lent(event.block_ids, event.cached_tokens, self._clock.now())
            case Refused():
                self._leases.fail(lease, from_label(event.code, event.message))
            case Stalled():
                if not lease.complete:  # else its reader does not need the engine
                    self._leases.fail(lease, event.error)
            case _:
                raise AssertionError(f"a loan has no {type(event).__name__}")
