"""Membership in Redis: a SET of worker ids, and per worker its report with a TTL.

    {namespace:members}             ->  { worker_id, ... }       who may be alive
    {namespace:members}:worker_id   ->  WorkerReport as JSON, PX TTL    its lease

The set only names the keys to look at: an id whose report has expired is dead, and is pruned by
whoever lists the workers next. Listing and pruning are one script, so that a worker that announces
itself in between cannot be pruned by mistake. The keys share a hash tag, for Redis Cluster.
"""

import logging

import msgspec

from services.core.worker_report import WorkerKey, WorkerReport
from services.membership.protocol import LEASE_S
from services.store.connection import Call, Script, StoreConnection

logger = logging.getLogger(__name__)

# KEYS: the set, the report. ARGV: id, report, TTL in ms. Reports are few and small: a server that has no
# memory for more blocks in the index still takes them.
ANNOUNCE = Script("""#!lua flags=allow-oom
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[1], ARGV[1])
""")

# KEYS: the set, the report. ARGV: id, the report as it was read. Returns 0 if it is another one by now.
LEAVE = Script("""
if redis.call('GET', KEYS[2]) ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SREM', KEYS[1], ARGV[1])
return 1
""")

# KEYS: the set. Returns id, report, id, report, ...
LIST_AND_PRUNE = Script("""
local alive = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local report = redis.call('GET', KEYS[1] .. ':' .. id)
  if report then
    alive[#alive + 1] = id
    alive[#alive + 1] = report
  else
    redis.call('SREM', KEYS[1], id)
  end
end
return alive
""")

# A report is replaced by the worker's own next one, or by that of a new incarnation, which then stays.
_LEAVE_TRIES_MAX = 3


class RedisMembership:
    """`url` as in StoreConnection. Clusters that share one Redis take different namespaces."""

    def __init__(
        self, url: str, *, ttl_s: float = LEASE_S, timeout_s: float = 1.0, namespace: str = "diptych"
    ) -> None:
        self._store = StoreConnection(url, timeout_s)
        self._ttl_ms = round(ttl_s * 1000)
        self._ids_key = f"{{{namespace}:members}}"
        self._unreadable: set[str] = set()  # ids whose report was complained about

    async def announce(self, report: WorkerReport) -> None:
        encoded = msgspec.json.encode(report)
        await self._store.run(
            Call(ANNOUNCE, self._keys(report.worker_id), report.worker_id, encoded, self._ttl_ms)
        )

    async def leave(self, worker: WorkerKey) -> None:
        ids_key, report_key = self._keys(worker.worker_id)
        for _ in range(_LEAVE_TRIES_MAX):
            async with self._store.client() as client:
                encoded = await client.get(report_key)
            report = self._decode(worker.worker_id, encoded) if encoded is not None else None
            if encoded is None or report is None or report.epoch != worker.epoch:
                return
            if await self._store.run(Call(LEAVE, [ids_key, report_key], worker.worker_id, encoded)):
                return

    async def workers(self) -> list[WorkerReport]:
        listed: list[bytes] = await self._store.run(Call(LIST_AND_PRUNE, [self._ids_key]))
        pairs = sorted(zip(listed[::2], listed[1::2], strict=True))
        reports = [self._decode(worker_id.decode(), encoded) for worker_id, encoded in pairs]
        return [report for report in reports if report is not None]

    async def close(self) -> None:
        await self._store.close()

    def _keys(self, worker_id: str) -> tuple[str, str]:
        """Of the set, and of the worker's report."""
        return self._ids_key, f"{self._ids_key}:{worker_id}"

    def _decode(self, worker_id: str, encoded: bytes | str) -> WorkerReport | None:
        """The report, or None if another version of Diptych wrote it."""
        try:
            report = msgspec.json.decode(encoded, type=WorkerReport)
        except msgspec.DecodeError as error:  # the parent of ValidationError
            if worker_id not in self._unreadable:
                logger.warning("ignoring worker %s, its report cannot be read: %s", worker_id, error)
            self._unreadable.add(worker_id)
            return None
        self._unreadable.discard(worker_id)
        return report
