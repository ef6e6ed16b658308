"""The door: whose request it is, and whether it may come in. Nothing of its body has been read by then.

Without keys configured anybody may, with any key or none. With keys every path wants one, except those that
machines ask (health, metrics) and the pages about the API, which say nothing about this cluster. The workers'
whole reports are shown to administrators' keys only. A request that was let in goes on to its end when its
key is revoked or expires meanwhile.
"""

import asyncio
from typing import NamedTuple

from starlette.datastructures import Headers

from services.core.child_tasks import ChildTasks
from services.core.clock import Clock
from services.core.errors import InvalidKey, NotAllowed
from services.gateway.door.key_ring import KeyRing
from services.gateway.door.tenant import ANYBODY, Tenant, bearer
from services.gateway.door.visits import Visit, Visits
from services.gateway.metrics import GatewayMetrics
from services.keys.protocol import KeyStore, LimitStore

OPEN_PATHS = frozenset(
    {
        *("/health", "/health/live", "/health/ready", "/metrics"),
        *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"),
    }
)
ADMIN_PATHS = frozenset({"/v1/cluster"})


class Locks(NamedTuple):
    """Closed with the door."""

    keys: KeyStore
    limits: LimitStore


class Door:
    """Without keys: open to anybody."""

    @property
    def ready(self) -> bool:
        return True

    def visit(self, method: str, path: str, headers: Headers, request_id: str) -> Visit:
        """Whose request it is. Raises InvalidKey, NotAllowed or StoreUnavailable."""
        return Visit(Tenant.of(headers.get("authorization")))

    async def enter(self, visit: Visit) -> None:
        """Raises RateLimited. What enters has to leave."""
        if visit.visits is not None:
            await visit.visits.enter(visit)

    def leave(self, visit: Visit) -> None:
        if visit.visits is not None:
            visit.visits.leave(visit)

    async def open(self) -> None:
        """Before anybody comes. Raises ConfigError for keys that cannot be understood."""

    async def watch(self) -> None:
        """Does for ever what has to be done while requests come."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """When nobody is inside any more."""


class LockedDoor(Door):
    def __init__(self, keys: KeyStore, limits: LimitStore, metrics: GatewayMetrics, clock: Clock) -> None:
        self.ring = KeyRing(keys, clock)
        self.visits = Visits(limits, metrics.keys, clock)
        self.ring.on_change = metrics.keys.know
        self._unauthorized = metrics.unauthorized

    @property
    def ready(self) -> bool:
        return self.ring.is_read

    def visit(self, method: str, path: str, headers: Headers, request_id: str) -> Visit:
        if path in OPEN_PATHS:
            return Visit(ANYBODY)
        tenant = self._tenant(headers)
        if path in ADMIN_PATHS and not tenant.admin:
            raise NotAllowed("This API key may not ask about the cluster; an administrator's may.")
        # Whatever is not a POST is answered from what is known.
        return self.visits.of(tenant, request_id) if method == "POST" else Visit(tenant)

    async def open(self) -> None:
        await self.ring.open()

    async def watch(self) -> None:
        """Follow changes of the keys, and count what is used."""
        async with ChildTasks() as tasks:
            watching = [tasks.start(self.ring.follow()), tasks.start(self.visits.settle_forever())]
            done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # neither ends, unless it breaks

    async def close(self) -> None:
        await self.visits.settle_ended()
        await self.visits.close()
        await self.ring.close()

    def _tenant(self, headers: Headers) -> Tenant:
        try:
            given = headers.getlist("authorization")
            key = bearer(given[0]) if len(given) == 1 else None
            if key is None:
                raise InvalidKey("Send one API key, in the header `Authorization: Bearer KEY`.")
            return self.ring.tenant_of(key)
        except InvalidKey:
            self._unauthorized.inc()
            raise
