"""Who is alive: every worker announces a WorkerReport that lives for a short time (its lease)."""

from typing import Protocol

from services.core.worker_report import WorkerKey, WorkerReport

LEASE_S = 2.0  # eight times the period of announcements


class Membership(Protocol):
    async def announce(self, report: WorkerReport) -> None:
        """Publish `report` for one TTL; repeated well within the TTL to stay alive."""
        ...

    async def leave(self, worker: WorkerKey) -> None:
        """Remove the worker now, if this incarnation is still the announced one."""
        ...

    async def workers(self) -> list[WorkerReport]:
        """The live workers, ordered by id."""
        ...

    async def close(self) -> None: ...
