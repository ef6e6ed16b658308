"""Membership in Redis: a SET of worker ids, and per worker its report with a TTL.

    {namespace}:members             ->  { worker_id, ... }       who may be alive
    {namespace}:member:{worker_id}  ->  WorkerReport as JSON, PX TTL    its lease

The set only names the keys to look at: an id whose report has expired is dead, and is pruned by
whoever lists the workers next. Listing and pruning are one script, so that a worker that announces
itself in between cannot be pruned by mistake.
"""

import logging

import msgspec
from redis.asyncio.client import Pipeline

from services.core.worker_report import WorkerKey, WorkerReport
from services.membership.protocol import LEASE_S
from services.store.connection import StoreConnection

logger = logging.getLogger(__name__)

# KEYS: the set, and the prefix of the report keys. Returns id, report, id, report, ...
LIST_AND_PRUNE = """
local alive = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local report = redis.call('GET', KEYS[2] .. id)
  if report then
    alive[#alive + 1] = id
    alive[#alive + 1] = report
  else
    redis.call('SREM', KEYS[1], id)
  end
end
return alive
"""


class RedisMembership:
    """`url` as in StoreConnection. Clusters that share one Redis take different namespaces."""

    def __init__(
        self, url: str, *, ttl_s: float = LEASE_S, timeout_s: float = 1.0, namespace: str = "diptych"
    ) -> None:
        self._store = StoreConnection(url, timeout_s)
        self._ttl_ms = round(ttl_s * 1000)
        self._ids_key = f"{namespace}:members"
        self._report_prefix = f"{namespace}:member:"
        self._list_and_prune = self._store.redis.register_script(LIST_AND_PRUNE)
        self._unreadable: set[str] = set()  # ids whose report was complained about

    async def announce(self, report: WorkerReport) -> None:
        async with self._store.call() as redis:
            pipeline = redis.pipeline(transaction=True)
            pipeline.set(self._report_key(report.worker_id), msgspec.json.encode(report), px=self._ttl_ms)
            pipeline.sadd(self._ids_key, report.worker_id)
            await pipeline.execute()

    async def leave(self, worker: WorkerKey) -> None:
        key = self._report_key(worker.worker_id)

        async def delete_if_announced(pipeline: Pipeline) -> None:
            report = self._decode(worker.worker_id, await pipeline.get(key))
            pipeline.multi()  # type: ignore[no-untyped-call]
            if report is not None and report.epoch == worker.epoch:
                pipeline.delete(key)
                pipeline.srem(self._ids_key, worker.worker_id)

        async with self._store.call() as redis:
            # Repeated when a new incarnation announces itself in between.
            await redis.transaction(delete_if_announced, key)

    async def workers(self) -> list[WorkerReport]:
        async with self._store.call():
            listed: list[bytes] = await self._list_and_prune(keys=[self._ids_key, self._report_prefix])
        pairs = sorted(zip(listed[::2], listed[1::2], strict=True))
        reports = [self._decode(worker_id.decode(), encoded) for worker_id, encoded in pairs]
        return [report for report in reports if report is not None]

    async def close(self) -> None:
        await self._store.close()

    def _report_key(self, worker_id: str) -> str:
        return self._report_prefix + worker_id

    def _decode(self, worker_id: str, encoded: bytes | str | None) -> WorkerReport | None:
        """The report, or None if there is none or another version of Diptych wrote it."""
        if encoded is None:
            return None
        try:
            report = msgspec.json.decode(encoded, type=WorkerReport)
        except msgspec.DecodeError as error:  # the parent of ValidationError
            if worker_id not in self._unreadable:
                logger.warning("ignoring worker %s, its report cannot be read: %s", worker_id, error)
            self._unreadable.add(worker_id)
            return None
        self._unreadable.discard(worker_id)
        return report
