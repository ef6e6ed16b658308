"""What every PrefixIndex promises, proven for the real one and its in-memory twin alike."""

import uuid
from dataclasses import dataclass

import pytest
import redis.asyncio

from services.core.block_hash import chain_hashes
from services.core.clock import ManualClock
from services.core.worker_report import WorkerKey
from services.index.memory_index import MemoryPrefixIndex
from services.index.protocol import PrefixIndex
from services.index.redis_index import MEMBERS_PER_COMMAND_MAX, RedisPrefixIndex

TTL_S = 30.0
CHAIN = chain_hashes(list(range(64)), block_size=4, root=b"root")
OTHER_CHAIN = chain_hashes(list(range(64)), block_size=4, root=b"another")
A, B = WorkerKey("a", 2**64 - 1), WorkerKey("b", 7)


@dataclass
class MemoryStore:
    """The twin, and what a test may do to the store behind it."""

    clock: ManualClock
    index: MemoryPrefixIndex

    async def pass_time(self, seconds):
        self.clock.advance(seconds)

    async def lose_everything(self):
        self.index.lose_everything()


@dataclass
class RedisStore:
    redis: redis.asyncio.Redis
    namespace: str
    index: RedisPrefixIndex

    async def pass_time(self, seconds):
        """Redis has no clock to advance, so every lifetime is shortened instead."""
        async for key in self.redis.scan_iter(f"{self.namespace}:*"):
            left_ms = await self.redis.pttl(key)
            assert left_ms >= 0, "every key of the index has a TTL"
            await self.redis.pexpire(key, max(0, left_ms - round(seconds * 1000)))

    async def lose_everything(self):
        async for key in self.redis.scan_iter(f"{self.namespace}:*"):
            await self.redis.delete(key)


@pytest.fixture(params=["memory", "redis"])
async def store(request):
    if request.param == "memory":
        clock = ManualClock()
        yield MemoryStore(clock, MemoryPrefixIndex(clock, ttl_s=TTL_S))
        return
    url, namespace = request.getfixturevalue("valkey_url"), uuid.uuid4().hex
    index = RedisPrefixIndex(url, ttl_s=TTL_S, timeout_s=10.0, namespace=namespace)
    async with redis.asyncio.Redis.from_url(url) as client:
        yield RedisStore(client, namespace, index)
    await index.close()


@pytest.fixture
def index(store) -> PrefixIndex:
    return store.index


class TestPrefixIndex:
    async def test_each_worker_counts_its_own_leading_blocks(self, index):
        await index.publish(A, CHAIN[:5], [])
        await index.publish(B, CHAIN + OTHER_CHAIN, [])
        assert await index.locate(CHAIN, [A, B]) == {A: 5, B: len(CHAIN)}
        assert await index.locate(OTHER_CHAIN, [A, B]) == {A: 0, B: len(CHAIN)}

    async def test_every_length_of_a_prefix_is_found(self, index):
        await index.publish(A, [], [])
        for length in range(len(CHAIN) + 1):
            assert await index.locate(CHAIN, [A]) == {A: length}
            await index.publish(A, CHAIN[length : length + 1], [])

    async def test_a_worker_that_never_published_holds_nothing(self, index):
        assert await index.locate(CHAIN, [A]) == {A: 0}

    async def test_an_empty_question_has_an_answer(self, index):
        await index.publish(A, CHAIN, [])
        assert await index.locate([], [A]) == {A: 0}
        assert await index.locate(CHAIN, []) == {}

    async def test_increments_add_and_evictions_remove(self, index):
        await index.publish(A, CHAIN[:4], [])
        await index.publish(A, CHAIN[4:8], [])
        await index.publish(A, [], CHAIN[6:8])
        assert await index.locate(CHAIN, [A]) == {A: 6}

    async def test_a_block_stored_and_evicted_in_one_publish_is_gone(self, index):
        await index.publish(A, CHAIN[:4], CHAIN[3:4])
        assert await index.locate(CHAIN, [A]) == {A: 3}

    async def test_publishing_twice_is_publishing_once(self, index):
        for _ in range(2):
            await index.publish(A, CHAIN[:4], CHAIN[4:5])
        assert await index.locate(CHAIN, [A]) == {A: 4}

    async def test_more_blocks_than_one_command_carries_all_arrive_and_all_leave(self, index):
        many = chain_hashes(list(range(2 * MEMBERS_PER_COMMAND_MAX + 1)), block_size=1, root=b"root")
        await index.publish(A, many, [])
        assert await index.locate(many, [A]) == {A: len(many)}
        await index.publish(A, [], many[1:])
        assert await index.locate(many, [A]) == {A: 1}

    async def test_entries_of_a_dead_epoch_are_invisible(self, index):
        reborn = WorkerKey("a", 1)
        await index.publish(A, CHAIN, [])
        await index.publish(reborn, CHAIN[:1], [])
        assert await index.locate(CHAIN, [reborn]) == {reborn: 1}
        assert await index.locate(CHAIN, [A, reborn]) == {A: len(CHAIN), reborn: 1}

    async def test_entries_of_a_dead_epoch_disappear_by_themselves(self, store, index):
        await index.publish(A, CHAIN, [])
        await store.pass_time(TTL_S + 1)
        assert await index.locate(CHAIN, [A]) == {A: 0}

    @pytest.mark.parametrize("refresh", ["renew", "publish"])
    async def test_renewing_and_publishing_keep_entries_alive(self, store, index, refresh):
        await index.publish(A, CHAIN[:4], [])
        for _ in range(3):
            await store.pass_time(TTL_S - 5)
            if refresh == "renew":
                assert await index.renew(A)
            else:
                await index.publish(A, [], [])
        assert await index.locate(CHAIN, [A]) == {A: 4}

    async def test_locating_does_not_keep_entries_alive(self, store, index):
        await index.publish(A, CHAIN, [])
        await store.pass_time(TTL_S - 5)
        await index.locate(CHAIN, [A])
        await store.pass_time(6)
        assert await index.locate(CHAIN, [A]) == {A: 0}

    async def test_a_worker_that_holds_nothing_can_renew(self, index):
        await index.publish(A, [], [])
        assert await index.renew(A)

    async def test_a_worker_whose_last_block_was_evicted_can_renew(self, index):
        await index.publish(A, CHAIN[:1], [])
        await index.publish(A, [], CHAIN[:1])
        assert await index.renew(A)

    async def test_a_worker_that_never_published_is_told_to(self, index):
        assert not await index.renew(A)

    @pytest.mark.parametrize("loss", ["expiry", "restart", "forget"])
    async def test_lost_entries_are_noticed_and_published_again(self, store, index, loss):
        await index.publish(A, CHAIN[:4], [])
        if loss == "expiry":
            await store.pass_time(TTL_S + 1)
        elif loss == "restart":
            await store.lose_everything()
        else:
            await index.forget(A)
        assert not await index.renew(A)
        await index.publish(A, CHAIN[:4], [])
        assert await index.renew(A)
        assert await index.locate(CHAIN, [A]) == {A: 4}

    async def test_an_increment_does_not_hide_that_the_rest_was_lost(self, store, index):
        await index.publish(A, CHAIN[:4], [])
        await store.lose_everything()
        await index.publish(A, CHAIN[4:6], [])
        assert not await index.renew(A)
        await index.publish(A, CHAIN[:6], [])
        assert await index.renew(A)
        assert await index.locate(CHAIN, [A]) == {A: 6}

    async def test_publishing_again_drops_what_the_worker_no_longer_holds(self, store, index):
        await index.publish(A, CHAIN, [])
        await store.lose_everything()
        await index.publish(A, OTHER_CHAIN, [])
        assert not await index.renew(A)
        await index.publish(A, CHAIN[:2], [])
        assert await index.locate(CHAIN, [A]) == {A: 2}
        assert await index.locate(OTHER_CHAIN, [A]) == {A: 0}

    async def test_forgetting_one_incarnation_leaves_the_others(self, index):
        await index.publish(A, CHAIN, [])
        await index.publish(B, CHAIN, [])
        await index.forget(A)
        assert await index.locate(CHAIN, [A, B]) == {A: 0, B: len(CHAIN)}
