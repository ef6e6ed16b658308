"""Kept answers in Redis.

    {namespace:responses:OWNER}       ->  sorted set: response id -> when it was stored, in ms
    {namespace:responses:OWNER}:ID    ->  the answer, with a TTL

The set says which are an owner's oldest. An id whose answer has expired goes when the next one is stored, and
the set itself expires with its last answer. The keys of one owner share a hash tag, for Redis Cluster.
"""

from services.history.protocol import KEPT_MAX
from services.store.connection import Call, Script, StoreConnection

# KEYS: the set, the answer. ARGV: id, answer, TTL in ms, how many are kept.
PUT = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[3])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local excess = redis.call('ZCARD', KEYS[1]) - ARGV[4]
if excess > 0 then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, excess - 1)) do
    redis.call('UNLINK', KEYS[1] .. ':' .. id)
  end
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, excess - 1)
end
""")

# KEYS: the answer.
GET = Script("return redis.call('GET', KEYS[1])")

# KEYS: the set, the answer. ARGV: id. Returns how many there were.
DELETE = Script("""
redis.call('ZREM', KEYS[1], ARGV[1])
return redis.call('UNLINK', KEYS[2])
""")


class RedisHistory:
    """`url` as in StoreConnection. Clusters that share one Redis take different namespaces."""

    def __init__(
        self,
        url: str,
        *,
        ttl_s: float,
        kept_max: int = KEPT_MAX,
        timeout_s: float = 1.0,
        namespace: str = "diptych",
    ) -> None:
        self._store = StoreConnection(url, timeout_s)
        self._ttl_ms, self._kept_max = max(1, round(ttl_s * 1000)), kept_max
        self._namespace = namespace

    async def put(self, owner: str, response_id: str, answer: bytes) -> None:
        keys = (self._set(owner), self._answer(owner, response_id))
        await self._store.run(Call(PUT, keys, response_id, answer, self._ttl_ms, self._kept_max))

    async def get(self, owner: str, response_id: str) -> bytes | None:
        answer: bytes | None = await self._store.run(Call(GET, [self._answer(owner, response_id)]))
        return answer

    async def delete(self, owner: str, response_id: str) -> bool:
        keys = (self._set(owner), self._answer(owner, response_id))
        return bool(await self._store.run(Call(DELETE, keys, response_id)))

    async def close(self) -> None:
        await self._store.close()

    def _set(self, owner: str) -> str:
        return f"{{{self._namespace}:responses:{owner}}}"

    def _answer(self, owner: str, response_id: str) -> str:
        return f"{self._set(owner)}:{response_id}"
