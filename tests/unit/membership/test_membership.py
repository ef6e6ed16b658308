"""What every Membership promises, proven for the real one and its in-memory twin alike."""

import uuid
from dataclasses import dataclass
from typing import Any

import pytest

from services.core.clock import ManualClock
from services.core.worker_report import WorkerKey
from services.membership.memory_membership import MemoryMembership
from services.membership.protocol import Membership
from services.membership.redis_membership import RedisMembership
from tests.support.redis_servers import KINDS, client_of

TTL_S = 20.0


@dataclass
class MemoryStore:
    clock: ManualClock
    membership: MemoryMembership

    async def pass_time(self, seconds):
        self.clock.advance(seconds)


@dataclass
class RedisStore:
    redis: Any
    namespace: str
    membership: RedisMembership

    async def pass_time(self, seconds):
        """Redis has no clock to advance, so every lease is shortened instead."""
        async for key in self.redis.scan_iter(f"{{{self.namespace}:members}}:*"):
            left_ms = await self.redis.pttl(key)
            assert left_ms >= 0, "every report has a TTL"
            await self.redis.pexpire(key, max(0, left_ms - round(seconds * 1000)))


@pytest.fixture(params=["memory", *KINDS])
async def store(request, redis_url):
    if request.param == "memory":
        clock = ManualClock()
        yield MemoryStore(clock, MemoryMembership(clock, ttl_s=TTL_S))
        return
    url, namespace = redis_url(request.param), uuid.uuid4().hex
    membership = RedisMembership(url, ttl_s=TTL_S, timeout_s=10.0, namespace=namespace)
    async with client_of(url, request.param) as client:
        yield RedisStore(client, namespace, membership)
    await membership.close()


@pytest.fixture
def membership(store) -> Membership:
    return store.membership


class TestMembership:
    async def test_nobody_is_alive_at_first(self, membership):
        assert await membership.workers() == []

    async def test_announced_workers_are_listed_by_id_with_their_whole_report(self, membership, report):
        announced = [report(worker_id) for worker_id in ("b", "a", "c10", "c9")]
        for each in announced:
            await membership.announce(each)
        assert await membership.workers() == sorted(announced, key=lambda each: each.worker_id)

    async def test_the_latest_report_counts(self, membership, report):
        await membership.announce(report("a", running=1))
        await membership.announce(report("a", running=2, state="draining"))
        assert await membership.workers() == [report("a", running=2, state="draining")]

    async def test_a_worker_that_falls_silent_is_dead_after_the_ttl(self, store, membership, report):
        await membership.announce(report("a"))
        await membership.announce(report("b"))
        await store.pass_time(TTL_S - 2)
        await membership.announce(report("b"))
        await store.pass_time(4)
        assert await membership.workers() == [report("b")]

    async def test_a_dead_worker_may_come_back(self, store, membership, report):
        await membership.announce(report("a", epoch=1))
        await store.pass_time(TTL_S + 1)
        assert await membership.workers() == []
        await membership.announce(report("a", epoch=2))
        assert await membership.workers() == [report("a", epoch=2)]

    async def test_who_leaves_is_gone_at_once(self, membership, report):
        await membership.announce(report("a"))
        await membership.announce(report("b"))
        await membership.leave(report("a").key)
        assert await membership.workers() == [report("b")]

    async def test_a_late_leave_of_a_former_incarnation_changes_nothing(self, membership, report):
        # The two epochs are one number to anything that reads them as doubles.
        former, current = report("a", epoch=2**64 - 2), report("a", epoch=2**64 - 1)
        await membership.announce(former)
        await membership.announce(current)
        await membership.leave(former.key)
        assert await membership.workers() == [current]

    async def test_leaving_without_having_announced_is_no_error(self, membership):
        await membership.leave(WorkerKey("nobody", 1))
        assert await membership.workers() == []
