"""The in-memory twin of the Redis membership, for tests and the simulator: injected time.

One object stands for the shared store; workers and gateways of a simulated cluster all hold it.
`available` and `lose_everything` are its faults.
"""

from services.core.clock import Clock
from services.core.errors import StoreUnavailable
from services.core.worker_report import WorkerKey, WorkerReport
from services.membership.protocol import LEASE_S


class MemoryMembership:
    def __init__(self, clock: Clock, *, ttl_s: float = LEASE_S) -> None:
        self.available = True  # False: every call raises StoreUnavailable
        self._clock = clock
        self._ttl_s = ttl_s
        self._leases: dict[str, tuple[float, WorkerReport]] = {}  # worker id: end in seconds, report

    async def announce(self, report: WorkerReport) -> None:
        self._require_available()
        self._leases[report.worker_id] = (self._clock.now() + self._ttl_s, report)

    async def leave(self, worker: WorkerKey) -> None:
        announced = self._live_reports().get(worker.worker_id)
        if announced is not None and announced.epoch == worker.epoch:
            del self._leases[worker.worker_id]

    async def workers(self) -> list[WorkerReport]:
        return [report for _, report in sorted(self._live_reports().items())]

    async def close(self) -> None:
        pass

    def lose_everything(self) -> None:
        """What a restart of Redis does."""
        self._leases.clear()

    def _live_reports(self) -> dict[str, WorkerReport]:
        self._require_available()
        now = self._clock.now()
        self._leases = {key: lease for key, lease in self._leases.items() if lease[0] > now}
        return {worker_id: report for worker_id, (_, report) in self._leases.items()}

    def _require_available(self) -> None:
        if not self.available:
            raise StoreUnavailable("the in-memory membership is switched off")
