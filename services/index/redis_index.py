"""The prefix index in Redis: per worker incarnation one SET of block hashes, and who is in it.

    {namespace:index:S}                    ->  { entry key, ... }        the entries of shard S
    {namespace:index:S}:worker_id:epoch    ->  { "", hash, hash, ... }   an entry, TTL renewed

The empty member is there from the entry's beginning and shows that nothing is missing: a SET that had
been lost and then grew by an increment would lack it. Of a hash the first HASH_BYTES_KEPT bytes are kept:
two blocks of one worker that agree in them cost a cache hit, not correctness, and are met once in
36 million lives of a worker with a million blocks (n^2 / 2^65).

A worker belongs to a shard by its id. All keys of a shard have one hash tag, so that they
are in one slot of a Redis Cluster, and the shards are spread over its nodes. A look-up is one script
call, with the whole chain as one binary argument, on a cluster one for each shard, to all nodes at
once. Because a block proves the ones before it, a script need not look at all of a chain; docs/adr/0002
has the measurements.

Each renewal also sweeps one shard, in turn: entries that nobody has renewed are unlinked, which frees
their memory in the background, where an expiry would stop the server for the time that it takes.
"""

import zlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import count

from services.core.block_hash import HASH_BYTES
from services.core.worker_report import WorkerKey
from services.index.protocol import DEAD_AFTER_S, TTL_S
from services.store.connection import Call, Script, StoreConnection

# A look-up on a cluster takes a call for each. As CRC16 is linear, these names fall into eight equal parts of
# the cluster's slots whatever the namespace is, so up to eight nodes share the index evenly.
SHARDS = "0123abcd"
HASH_BYTES_KEPT = 8
_KEYS_CACHED = 4_096

# KEYS: the entry, its shard. ARGV: TTL in ms.
BEGIN = Script("""
redis.call('UNLINK', KEYS[1])
redis.call('SADD', KEYS[1], '')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SADD', KEYS[2], KEYS[1])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
""")

# KEYS: the entry. ARGV: hashes stored, hashes evicted. Returns 0 if there is no entry. What is stored comes
# first: when the server has no memory, a script fails only at its first command that writes.
PUBLISH = Script(f"""
if redis.call('SISMEMBER', KEYS[1], '') == 0 then return 0 end
local function change(command, hashes)
  local members = {{}}
  for first = 1, #hashes, {HASH_BYTES} do
    members[#members + 1] = string.sub(hashes, first, first + {HASH_BYTES_KEPT - 1})
    if #members == 1000 then
      redis.call(command, KEYS[1], unpack(members))
      members = {{}}
    end
  end
  if #members > 0 then redis.call(command, KEYS[1], unpack(members)) end
end
change('SADD', ARGV[1])
change('SREM', ARGV[2])
return 1
""")

# KEYS: the entry, its shard. ARGV: TTL in ms. Returns 0 if there is no entry, or it is not complete.
RENEW = Script("""
if redis.call('SISMEMBER', KEYS[1], '') == 0 then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return redis.call('SISMEMBER', KEYS[2], KEYS[1])
""")

# KEYS: a shard. ARGV: an entry that has less than so many ms to live is dead.
SWEEP = Script("""
for _, entry in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if redis.call('PTTL', entry) < tonumber(ARGV[1]) then
    redis.call('UNLINK', entry)
    redis.call('SREM', KEYS[1], entry)
  end
end
""")

# KEYS: the entry, its shard.
FORGET = Script("""
redis.call('UNLINK', KEYS[1])
redis.call('SREM', KEYS[2], KEYS[1])
""")

# KEYS: entries. ARGV: the chain. Returns the number of leading blocks in each entry. Workers often hold
# equally much of a chain (nothing, all of it, a common beginning): the first guess is what the one before
# held, the next that it is nothing; the rest is a binary search.
LOCATE = Script(f"""
local chain, blocks = ARGV[1], #ARGV[1] / {HASH_BYTES}
local call, sub, floor = redis.call, string.sub, math.floor
local counts, guess = {{}}, 1
local entry, low, high
local function probe(block)
  if low < block and block <= high then
    local first = (block - 1) * {HASH_BYTES} + 1
    local hash = sub(chain, first, first + {HASH_BYTES_KEPT - 1})
    if call('SISMEMBER', entry, hash) == 1 then low = block else high = block - 1 end
  end
end
for w = 1, #KEYS do
  entry, low, high = KEYS[w], 0, blocks
  probe(guess)
  probe(guess + 1)
  probe(1)
  while low < high do probe(floor((low + high + 1) / 2)) end
  counts[w] = low
  if low > 0 then guess = low end
end
return table.concat(counts, ' ')
""")


class RedisPrefixIndex:
    """`url` as in StoreConnection. Clusters that share one Redis take different namespaces."""

    def __init__(self, url: str, *, timeout_s: float = 1.0, namespace: str = "diptych") -> None:
        self._store = StoreConnection(url, timeout_s)
        self._namespace = namespace
        self._keys = lru_cache(_KEYS_CACHED)(self._make_keys)
        self._renewals = count()

    async def begin(self, worker: WorkerKey) -> None:
        await self._store.run(Call(BEGIN, self._keys(worker), _ms(TTL_S)))

    async def publish(self, worker: WorkerKey, stored: Sequence[bytes], evicted: Sequence[bytes]) -> bool:
        entry, _ = self._keys(worker)
        return bool(await self._store.run(Call(PUBLISH, [entry], b"".join(stored), b"".join(evicted))))

    async def renew(self, worker: WorkerKey) -> bool:
        renewed = await self._store.run(Call(RENEW, self._keys(worker), _ms(TTL_S)))
        swept = self._shard_key(_number_of_shard(worker) + next(self._renewals))
        await self._store.run(Call(SWEEP, [swept], _ms(TTL_S - DEAD_AFTER_S)))
        return bool(renewed)

    async def locate(self, hashes: Sequence[bytes], workers: Sequence[WorkerKey]) -> dict[WorkerKey, int]:
        if not hashes or not workers:
            return dict.fromkeys(workers, 0)
        chain = b"".join(hashes)
        groups = _by_shard(workers) if await self._store.is_cluster() else [workers]
        calls = [Call(LOCATE, [self._keys(worker)[0] for worker in group], chain) for group in groups]
        counts: list[bytes] = await self._store.run_all(calls)
        return {
            worker: int(number)
            for group, numbers in zip(groups, counts, strict=True)
            for worker, number in zip(group, numbers.split(), strict=True)
        }

    async def forget(self, worker: WorkerKey) -> None:
        await self._store.run(Call(FORGET, self._keys(worker)))

    async def close(self) -> None:
        await self._store.close()

    def _make_keys(self, worker: WorkerKey) -> tuple[str, str]:
        """Of the worker's entry, and of its shard."""
        shard = self._shard_key(_number_of_shard(worker))
        return f"{shard}:{worker.worker_id}:{worker.epoch}", shard

    def _shard_key(self, number: int) -> str:
        return f"{{{self._namespace}:index:{SHARDS[number % len(SHARDS)]}}}"


def _number_of_shard(worker: WorkerKey) -> int:
    return zlib.crc32(worker.worker_id.encode()) % len(SHARDS)


def _by_shard(workers: Sequence[WorkerKey]) -> list[list[WorkerKey]]:
    groups: defaultdict[int, list[WorkerKey]] = defaultdict(list)
    for worker in workers:
        groups[_number_of_shard(worker)].append(worker)
    return list(groups.values())


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
