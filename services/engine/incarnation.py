"""Which incarnation of a worker this is, and whether it takes new work."""

from dataclasses import dataclass

from services.core.errors import Overloaded, WorkerLost
from services.core.worker_report import WorkerKey


@dataclass(slots=True)
class Incarnation:
    key: WorkerKey
    draining: bool = False

    def check(self, epoch: int) -> None:
        """Raise unless a request that was routed to `epoch` may start here."""
        if epoch != self.key.epoch:
            raise WorkerLost(f"worker {self.key.worker_id} has restarted since the request was routed")
        if self.draining:
            raise Overloaded(f"worker {self.key.worker_id} is draining")
