"""What every LimitStore promises, proven for the in-memory twin and for real servers alike."""

import asyncio
import os
import signal
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from services.core.clock import ManualClock
from services.core.errors import StoreUnavailable
from services.keys.api_key import KeyLimits
from services.keys.memory_limits import MemoryLimits
from services.keys.protocol import LEASE_S, WINDOW_S, Use
from services.keys.redis_limits import RedisLimits
from services.store.embedded import EmbeddedValkey
from tests.support.redis_servers import KINDS, client_of

KEY, OTHER = "0f3a9c1b2d4e", "0f3a9c1b2d4f"
NONE = KeyLimits()


@dataclass
class MemoryStore:
    clock: ManualClock
    limits: MemoryLimits

    async def pass_time(self, seconds):
        self.clock.advance(seconds)

    async def another_gateway(self):
        return self.limits

    async def keys(self):
        return 0


@dataclass
class RedisStore:
    url: str
    redis: Any
    namespace: str
    limits: RedisLimits

    async def pass_time(self, seconds):
        """Redis has no clock to advance, so every moment that it keeps is moved instead."""
        for key in await self._keys():
            left_ms = await self.redis.pttl(key)
            assert left_ms >= 0, "every key of the limits has a TTL"
            if key.endswith(b":running"):
                for lease in await self.redis.zrange(key, 0, -1):
                    await self.redis.zincrby(key, -seconds * 1000, lease)
            else:
                for name, at in (await self.redis.hgetall(key)).items():
                    await self.redis.hset(key, name, float(at) - seconds * 1000)
            await self.redis.pexpire(key, max(0, left_ms - round(seconds * 1000)))

    async def another_gateway(self):
        return RedisLimits(self.url, timeout_s=10.0, namespace=self.namespace)

    async def keys(self):
        return len(await self._keys())

    async def _keys(self):
        return {key async for key in self.redis.scan_iter(f"{{{self.namespace}:limits:*")}


@asynccontextmanager
async def opened(kind, redis_url):
    if kind == "memory":
        clock = ManualClock(1e6)
        yield MemoryStore(clock, MemoryLimits(clock))
        return
    url, namespace = redis_url(kind), uuid.uuid4().hex
    limits = RedisLimits(url, timeout_s=10.0, namespace=namespace)
    async with client_of(url, kind) as client:
        yield RedisStore(url, client, namespace, limits)
    await limits.close()


@pytest.fixture(params=["memory", *KINDS])
async def store(request, redis_url):
    async with opened(request.param, redis_url) as store:
        yield store


@pytest.fixture
def limits(store):
    return store.limits


async def refused(limits, most, use, key=KEY):
    return (await limits.take(key, most, use)).refused


def soon(seconds):
    """Servers' clocks go on while a test runs."""
    return pytest.approx(seconds, abs=1.5)


class TestLimitStore:
    async def test_without_limits_nothing_is_refused_and_nothing_kept(self, store, limits) -> None:
        for number in range(20):
            assert await refused(limits, NONE, Use(1, 10_000, f"r{number}")) is None
        assert await store.keys() == 0

    async def test_a_minute_s_requests_may_come_at_once_and_no_more(self, store, limits) -> None:
        most = KeyLimits(requests_per_minute=3)
        assert [await refused(limits, most, Use(1)) for _ in range(4)] == [None] * 3 + ["requests"]
        await store.pass_time(WINDOW_S / 3 + 1)
        assert [await refused(limits, most, Use(1)) for _ in range(2)] == [None, "requests"]
        await store.pass_time(2 * WINDOW_S)
        assert [await refused(limits, most, Use(1)) for _ in range(4)] == [None] * 3 + ["requests"]

    async def test_a_refusal_says_when_to_come_again_and_then_it_is_true(self, store, limits) -> None:
        most = KeyLimits(requests_per_minute=6)
        for _ in range(6):
            await limits.take(KEY, most, Use(1))
        verdict = await limits.take(KEY, most, Use(1))
        assert verdict.retry_after_s == soon(10)
        await store.pass_time(verdict.retry_after_s + 0.01)
        assert await refused(limits, most, Use(1)) is None

    async def test_what_is_used_is_told(self, store, limits) -> None:
        most = KeyLimits(requests_per_minute=6, tokens_per_minute=100)
        verdict = await limits.take(KEY, most, Use(3, 75))
        assert (verdict.requests_used_s, verdict.tokens_used_s) == (soon(30), soon(45))
        await store.pass_time(10)
        verdict = await limits.take(KEY, most, Use())
        assert (verdict.requests_used_s, verdict.tokens_used_s) == (soon(20), soon(35))

    async def test_tokens_are_taken_as_far_as_they_fit(self, store, limits) -> None:
        most = KeyLimits(tokens_per_minute=100)
        assert await refused(limits, most, Use(0, 60)) is None
        assert await refused(limits, most, Use(0, 60)) == "tokens"
        assert await refused(limits, most, Use(0, 40)) is None
        await store.pass_time(WINDOW_S / 2)
        assert await refused(limits, most, Use(0, 50)) is None

    async def test_more_than_a_minute_has_is_let_in_alone_and_paid_for(self, store, limits) -> None:
        most = KeyLimits(tokens_per_minute=100)
        await limits.take(KEY, most, Use(0, 20))
        verdict = await limits.take(KEY, most, Use(0, 300))
        assert (verdict.refused, verdict.retry_after_s) == ("tokens", soon(12))
        await store.pass_time(13)
        assert await refused(limits, most, Use(0, 300)) is None
        verdict = await limits.take(KEY, most, Use(1, 0))
        assert (verdict.refused, verdict.retry_after_s) == ("tokens", soon(120))
        await store.pass_time(verdict.retry_after_s + 1)
        assert await refused(limits, most, Use(1, 0)) is None

    async def test_tokens_of_answers_count_although_they_were_not_asked_for(self, store, limits) -> None:
        most = KeyLimits(tokens_per_minute=100)
        await limits.settle(KEY, most, 150, [], [])
        assert await refused(limits, most, Use(1)) == "tokens"
        await store.pass_time(WINDOW_S)
        assert await refused(limits, most, Use(1)) is None

    async def test_so_many_run_at_the_same_time(self, limits) -> None:
        most = KeyLimits(concurrent=2)
        assert [await refused(limits, most, Use(1, 0, name)) for name in "abc"] == [None, None, "concurrent"]
        await limits.settle(KEY, most, 0, ["b"], ["a"])
        assert [await refused(limits, most, Use(1, 0, name)) for name in "cd"] == [None, "concurrent"]

    async def test_a_lease_that_nobody_renews_ends_and_a_renewed_one_does_not(self, store, limits) -> None:
        most = KeyLimits(concurrent=2)
        for name in "ab":
            await limits.take(KEY, most, Use(1, 0, name))
        await store.pass_time(LEASE_S - 2)
        await limits.settle(KEY, most, 0, ["b"], [])
        assert await refused(limits, most, Use(1, 0, "c")) == "concurrent"
        await store.pass_time(3)
        assert [await refused(limits, most, Use(1, 0, name)) for name in "cd"] == [None, "concurrent"]

    async def test_a_refused_request_takes_nothing(self, store, limits) -> None:
        most = KeyLimits(requests_per_minute=2, concurrent=1)
        await limits.take(KEY, most, Use(1, 0, "a"))
        for number in range(5):
            assert await refused(limits, most, Use(1, 0, f"r{number}")) == "concurrent"
        await limits.settle(KEY, most, 0, [], ["a"])
        assert await refused(limits, most, Use(1, 0, "b")) is None

    async def test_a_request_that_runs_takes_tokens_however_many_run(self, limits) -> None:
        most = KeyLimits(tokens_per_minute=100, concurrent=1)
        await limits.take(KEY, most, Use(1, 0, "a"))
        assert await refused(limits, most, Use(tokens=10)) is None

    async def test_keys_have_limits_of_their_own(self, limits) -> None:
        most = KeyLimits(requests_per_minute=1)
        assert [await refused(limits, most, Use(1), key) for key in (KEY, OTHER)] == [None, None]
        assert [await refused(limits, most, Use(1), key) for key in (KEY, OTHER)] == ["requests"] * 2

    async def test_two_gateways_share_every_limit(self, store, limits) -> None:
        other, taken = await store.another_gateway(), []
        most = KeyLimits(requests_per_minute=10, concurrent=7)
        for number in range(6):
            for name, gateway in (("one", limits), ("other", other)):
                taken.append(await refused(gateway, most, Use(1, 0, f"{name}-{number}")))
            if taken.count(None) == 4:
                await other.settle(KEY, most, 0, [], ["other-0", "other-1"])
        assert taken == [None] * 9 + ["concurrent"] * 3
        await other.close()

    async def test_of_requests_at_the_same_moment_as_many_pass_as_may(self, limits) -> None:
        most = KeyLimits(requests_per_minute=10)
        verdicts = await asyncio.gather(*(limits.take(KEY, most, Use(1)) for _ in range(30)))
        assert [verdict.refused for verdict in verdicts].count(None) == 10

    async def test_a_limit_that_is_changed_counts_at_once(self, store, limits) -> None:
        for _ in range(5):
            await limits.take(KEY, KeyLimits(requests_per_minute=5), Use(1))
        assert await refused(limits, KeyLimits(requests_per_minute=5), Use(1)) == "requests"
        await store.pass_time(7)
        assert await refused(limits, KeyLimits(requests_per_minute=10), Use(1)) is None

    async def test_nothing_is_kept_of_a_key_that_does_nothing(self, store, limits) -> None:
        most = KeyLimits(5, 100, 5)
        await limits.take(KEY, most, Use(1, 50, "a"))
        await limits.settle(KEY, most, 500, ["a"], [])
        await store.pass_time(10 * WINDOW_S)
        assert await store.keys() == 0


async def test_a_redis_that_hangs_or_is_gone_is_unavailable_before_a_client_notices() -> None:
    def calls():
        return limits.take(KEY, KeyLimits(1), Use(1)), limits.settle(KEY, NONE, 1, [], [])

    with EmbeddedValkey() as server:
        limits = RedisLimits(server.url)
        assert await refused(limits, KeyLimits(1), Use(1)) is None
        os.kill(server.pid, signal.SIGSTOP)
        for call in calls():
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await call
            assert time.monotonic() - started < 2  # TIMEOUT_S, on a busy machine
        os.kill(server.pid, signal.SIGCONT)
    for call in calls():
        with pytest.raises(StoreUnavailable):
            await call
    await limits.close()
