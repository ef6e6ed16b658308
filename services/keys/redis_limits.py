"""What keys have used of their limits, in Redis, for all gateways together.

    {namespace:limits:ID}          ->  hash: requests, tokens: when each bucket will be full again, in ms
    {namespace:limits:ID}:running  ->  sorted set: lease -> when it ends

Time is the server's. Both keys of an API key have one hash tag, so a Redis Cluster spreads keys over its
nodes and each script touches one slot. Both expire when nothing of them is used any more.

A gateway whose call failed cannot know whether it counted. It goes on with counters of its own, so nothing
is counted twice here; a lease that nobody renews ends by itself.
"""

from collections.abc import Collection, Sequence

from services.keys.api_key import KeyLimits
from services.keys.memory_limits import CONCURRENT_RETRY_S
from services.keys.protocol import LEASE_S, WINDOW_S, Limit, Use, Verdict
from services.store.connection import Call, Script, StoreConnection

TIMEOUT_S = 0.25  # requests wait for the answer, and there is another way
REFUSALS: tuple[Limit | None, ...] = (None, "concurrent", "requests", "tokens")  # as the script numbers them

_BUCKETS = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local window = tonumber(ARGV[1])
local function full_at(field) return math.max(tonumber(redis.call('HGET', KEYS[1], field) or 0), now) end
local function refill_ms(number, per_minute)
  if per_minute == 0 then return 0 end
  return number * window / per_minute
end
local function keep(field, at)
  if at <= now then return end
  redis.call('HSET', KEYS[1], field, string.format('%.3f', at))
  local last = math.max(full_at('requests'), full_at('tokens'))
  redis.call('PEXPIRE', KEYS[1], math.ceil(last - now))
end
"""

# KEYS: the hash, the set. ARGV: window in ms; limits of requests, tokens and concurrent ones (0: none);
# requests and tokens wanted; lease or '', its ms. Returns the number of the refusal, ms until it is none, ms
# of each bucket in use.
TAKE = Script(f"""#!lua flags=allow-oom
{_BUCKETS}
local per_minute, tokens_per_minute, concurrent = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local requests_at, tokens_at = full_at('requests'), full_at('tokens')
local requests = requests_at + refill_ms(tonumber(ARGV[5]), per_minute)
local tokens = tokens_at + refill_ms(tonumber(ARGV[6]), tokens_per_minute)
local lease = ARGV[7]

local refused, retry = 0, 0
if lease ~= '' and concurrent > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  if redis.call('ZCARD', KEYS[2]) >= concurrent then refused = 1 end
end
if refused == 0 and per_minute > 0 and requests - now > window then
  refused, retry = 2, requests - now - window
end
if refused == 0 and tokens_per_minute > 0 and tokens - now > window and tokens_at > now then
  refused, retry = 3, math.min(tokens - now - window, tokens_at - now)
end

if refused == 0 then
  keep('requests', requests)
  keep('tokens', tokens)
  requests_at, tokens_at = requests, tokens
  if lease ~= '' and concurrent > 0 then
    redis.call('ZADD', KEYS[2], now + ARGV[8], lease)
    redis.call('PEXPIRE', KEYS[2], ARGV[8])
  end
end
local function text(ms) return string.format('%.3f', ms) end
return {{refused, text(retry), text(requests_at - now), text(tokens_at - now)}}
""")

# KEYS: the same. ARGV: window in ms, limit of tokens (0: none), tokens used, a lease's ms, how many of the
# leases that follow run; the others have ended.
SETTLE = Script(f"""#!lua flags=allow-oom
{_BUCKETS}
local used = refill_ms(tonumber(ARGV[3]), tonumber(ARGV[2]))
if used > 0 then keep('tokens', full_at('tokens') + used) end
local running = 5 + ARGV[5]
for n = 6, #ARGV do
  if n <= running then redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[n])
  else redis.call('ZREM', KEYS[2], ARGV[n]) end
end
if running > 5 then redis.call('PEXPIRE', KEYS[2], ARGV[4]) end
""")


class RedisLimits:
    """`url` as in StoreConnection. Clusters that share one Redis take different namespaces."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, namespace: str = "diptych") -> None:
        self._store = StoreConnection(url, timeout_s)
        self._namespace = namespace

    async def take(self, key_id: str, limits: KeyLimits, use: Use) -> Verdict:
        most = (limits.requests_per_minute or 0, limits.tokens_per_minute or 0, limits.concurrent or 0)
        wanted = (use.requests, use.tokens, use.lease, _ms(LEASE_S))
        answer = await self._store.run(Call(TAKE, self._keys(key_id), _ms(WINDOW_S), *most, *wanted))
        retry_s, requests_used_s, tokens_used_s = (float(ms) / 1e3 for ms in answer[1:])
        refused = REFUSALS[answer[0]]
        retry_after_s = CONCURRENT_RETRY_S if refused == "concurrent" else retry_s
        return Verdict(refused, retry_after_s, requests_used_s, tokens_used_s)

    async def settle(
        self, key_id: str, limits: KeyLimits, tokens: int, running: Sequence[str], ended: Collection[str]
    ) -> None:
        counted = (_ms(WINDOW_S), limits.tokens_per_minute or 0, tokens)
        renewed = (_ms(LEASE_S), len(running))
        leases = (*running, *ended)
        await self._store.run(Call(SETTLE, self._keys(key_id), *counted, *renewed, *leases))

    async def close(self) -> None:
        await self._store.close()

    def _keys(self, key_id: str) -> tuple[str, str]:
        tagged = f"{{{self._namespace}:limits:{key_id}}}"
        return tagged, f"{tagged}:running"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
