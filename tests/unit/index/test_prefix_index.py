"""What every PrefixIndex promises, proven for the in-memory twin and for real servers alike."""

import asyncio
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.block_hash import chain_hashes
from services.core.clock import ManualClock
from services.core.worker_report import WorkerKey
from services.index.memory_index import MemoryPrefixIndex
from services.index.protocol import DEAD_AFTER_S, TTL_S, PrefixIndex
from services.index.redis_index import SHARDS, RedisPrefixIndex
from tests.support.redis_servers import KINDS, client_of

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

    async def entries(self):
        return len(self.index._entries)


@dataclass
class RedisStore:
    redis: Any
    namespace: str
    index: RedisPrefixIndex

    async def pass_time(self, seconds):
        """Redis has no clock to advance, so every lifetime is shortened instead."""
        for key in await self._keys():
            left_ms = await self.redis.pttl(key)
            assert left_ms >= 0, "every key of the index has a TTL"
            await self.redis.pexpire(key, max(0, left_ms - round(seconds * 1000)))

    async def lose_everything(self):
        for key in await self._keys():
            await self.redis.delete(key)

    async def entries(self):
        return sum(key.count(b":") > 2 for key in await self._keys())

    async def _keys(self):
        """A scan may name a key twice."""
        return {key async for key in self.redis.scan_iter(f"{{{self.namespace}:index:*")}


@asynccontextmanager
async def opened(kind, redis_url):
    if kind == "memory":
        clock = ManualClock()
        yield MemoryStore(clock, MemoryPrefixIndex(clock))
        return
    url, namespace = redis_url(kind), uuid.uuid4().hex
    index = RedisPrefixIndex(url, timeout_s=10.0, namespace=namespace)
    async with client_of(url, kind) as client:
        yield RedisStore(client, namespace, index)
    await index.close()


@pytest.fixture(params=["memory", *KINDS])
async def store(request, redis_url):
    async with opened(request.param, redis_url) as store:
        yield store


@pytest.fixture
def index(store) -> PrefixIndex:
    return store.index


async def begun(index, worker, blocks=()):
    """An entry that holds `blocks`."""
    await index.begin(worker)
    assert await index.publish(worker, blocks, [])


class TestPrefixIndex:
    async def test_each_worker_counts_its_own_leading_blocks(self, index):
        await begun(index, A, CHAIN[:5])
        await begun(index, B, CHAIN + OTHER_CHAIN)
        assert await index.locate(CHAIN, [A, B]) == {A: 5, B: len(CHAIN)}
        assert await index.locate(OTHER_CHAIN, [A, B]) == {A: 0, B: len(CHAIN)}

    async def test_every_length_of_a_prefix_is_found(self, index):
        await begun(index, A)
        for length in range(len(CHAIN) + 1):
            assert await index.locate(CHAIN, [A]) == {A: length}
            await index.publish(A, CHAIN[length : length + 1], [])

    async def test_many_workers_that_hold_any_length_are_told_apart(self, index):
        workers = [WorkerKey(f"w{number}", number) for number in range(6 * len(SHARDS))]
        held = {worker: (7 * worker.epoch) % (len(CHAIN) + 1) for worker in workers}
        for worker in workers:
            await begun(index, worker, CHAIN[: held[worker]])
        assert await index.locate(CHAIN, workers) == held
        assert await index.locate(CHAIN[:5], workers) == {w: min(5, length) for w, length in held.items()}

    async def test_a_worker_that_never_published_holds_nothing(self, index):
        assert await index.locate(CHAIN, [A]) == {A: 0}

    async def test_an_empty_question_has_an_answer(self, index):
        await begun(index, A, CHAIN)
        assert await index.locate([], [A]) == {A: 0}
        assert await index.locate(CHAIN, []) == {}

    async def test_increments_add_and_evictions_remove(self, index):
        await begun(index, A, CHAIN[:4])
        await index.publish(A, CHAIN[4:8], [])
        await index.publish(A, [], CHAIN[6:8])
        assert await index.locate(CHAIN, [A]) == {A: 6}

    async def test_a_block_stored_and_evicted_in_one_publish_is_gone(self, index):
        await begun(index, A)
        await index.publish(A, CHAIN[:4], CHAIN[3:4])
        assert await index.locate(CHAIN, [A]) == {A: 3}

    async def test_publishing_twice_is_publishing_once(self, index):
        await index.begin(A)
        for _ in range(2):
            await index.publish(A, CHAIN[:4], CHAIN[4:5])
        assert await index.locate(CHAIN, [A]) == {A: 4}

    async def test_more_blocks_than_one_command_takes_all_arrive_and_all_leave(self, index):
        many = chain_hashes(list(range(2_001)), block_size=1, root=b"root")
        await begun(index, A, many)
        assert await index.locate(many, [A]) == {A: len(many)}
        await index.publish(A, [], many[1:])
        assert await index.locate(many, [A]) == {A: 1}

    async def test_entries_of_a_dead_epoch_are_invisible(self, index):
        reborn = WorkerKey("a", 1)
        await begun(index, A, CHAIN)
        await begun(index, reborn, CHAIN[:1])
        assert await index.locate(CHAIN, [reborn]) == {reborn: 1}
        assert await index.locate(CHAIN, [A, reborn]) == {A: len(CHAIN), reborn: 1}

    async def test_entries_of_a_dead_epoch_are_swept_by_others_and_nothing_is_left(self, store, index):
        dead = [WorkerKey(f"dead{number}", number) for number in range(6 * len(SHARDS))]
        for worker in dead:
            await begun(index, worker, CHAIN)
        await begun(index, A, CHAIN)
        await store.pass_time(DEAD_AFTER_S - 1)
        for _ in range(len(SHARDS)):
            assert await index.renew(A)
        assert await store.entries() == len(dead) + 1
        await store.pass_time(2)
        for _ in range(len(SHARDS)):
            assert await index.renew(A)
        assert await store.entries() == 1
        assert await index.locate(CHAIN, [A]) == {A: len(CHAIN)}

    async def test_entries_disappear_by_themselves_when_nobody_is_left(self, store, index):
        await begun(index, A, CHAIN)
        await store.pass_time(TTL_S + 1)
        assert await index.locate(CHAIN, [A]) == {A: 0}
        assert await store.entries() == 0

    async def test_renewing_keeps_an_entry_alive(self, store, index):
        await begun(index, A, CHAIN[:4])
        for _ in range(3):
            await store.pass_time(TTL_S - 5)
            assert await index.renew(A)
        assert await index.locate(CHAIN, [A]) == {A: 4}

    async def test_locating_does_not_keep_an_entry_alive(self, store, index):
        await begun(index, A, CHAIN)
        await store.pass_time(TTL_S - 5)
        await index.locate(CHAIN, [A])
        await store.pass_time(6)
        assert await index.locate(CHAIN, [A]) == {A: 0}

    async def test_a_worker_that_holds_nothing_can_renew(self, index):
        await index.begin(A)
        assert await index.renew(A)

    async def test_a_worker_whose_last_block_was_evicted_can_renew(self, index):
        await begun(index, A, CHAIN[:1])
        await index.publish(A, [], CHAIN[:1])
        assert await index.renew(A)

    async def test_who_has_not_begun_can_neither_renew_nor_publish(self, store, index):
        assert not await index.renew(A)
        assert not await index.publish(A, CHAIN, [])
        assert await index.locate(CHAIN, [A]) == {A: 0}
        assert await store.entries() == 0

    @pytest.mark.parametrize("loss", ["expiry", "restart", "forget"])
    async def test_a_lost_entry_is_noticed_and_no_increment_hides_it(self, store, index, loss):
        await begun(index, A, CHAIN[:4])
        if loss == "expiry":
            await store.pass_time(TTL_S + 1)
        elif loss == "restart":
            await store.lose_everything()
        else:
            await index.forget(A)
        assert not await index.publish(A, CHAIN[4:6], [])
        assert not await index.renew(A)
        assert await store.entries() == 0
        await begun(index, A, CHAIN[:6])
        assert await index.renew(A)
        assert await index.locate(CHAIN, [A]) == {A: 6}

    async def test_beginning_again_drops_what_the_worker_no_longer_holds(self, index):
        await begun(index, A, CHAIN + OTHER_CHAIN)
        await begun(index, A, CHAIN[:2])
        assert await index.locate(CHAIN, [A]) == {A: 2}
        assert await index.locate(OTHER_CHAIN, [A]) == {A: 0}

    async def test_forgetting_one_incarnation_leaves_the_others(self, store, index):
        await begun(index, A, CHAIN)
        await begun(index, B, CHAIN)
        await index.forget(A)
        assert await index.locate(CHAIN, [A, B]) == {A: 0, B: len(CHAIN)}
        assert await store.entries() == 1

    async def test_forgetting_twice_or_nobody_is_no_error(self, index):
        await index.forget(A)
        await index.forget(A)


# Three chains, two of which share a beginning, and three incarnations of two workers.
FORK = CHAIN[:3] + chain_hashes(list(range(100, 120)), block_size=4, root=CHAIN[2])
TREE = [CHAIN[:8], FORK, OTHER_CHAIN[:5]]
KEYS = [WorkerKey("a", 1), WorkerKey("a", 2), WorkerKey("b", 1)]

steps = st.tuples(
    st.sampled_from(["begin", "publish", "publish", "evict", "renew", "forget", "lose"]),
    st.sampled_from(KEYS),
    st.sampled_from(TREE),
    st.integers(0, 8),
)


@pytest.mark.parametrize("kind", ["memory", *KINDS])
@given(history=st.lists(steps, max_size=30))
@settings(max_examples=25)
def test_after_any_history_the_answer_is_that_of_a_simple_model(redis_url, kind, history):
    asyncio.run(follow(history, kind, redis_url))


async def follow(history, kind, redis_url):
    """Do the same to an index and to a model: the blocks of each incarnation that has begun."""
    async with opened(kind, redis_url) as store:
        model = {}
        for step, worker, chain, length in history:
            await follow_step(store, model, step, worker, chain, length)
        for chain in TREE:
            expected = {key: leading(chain, model.get(key, set())) for key in KEYS}
            assert await store.index.locate(chain, KEYS) == expected


async def follow_step(store, model, step, worker, chain, length):
    match step:
        case "begin":
            await store.index.begin(worker)
            model[worker] = set()
        case "publish":
            assert await store.index.publish(worker, chain[:length], []) == (worker in model)
            if worker in model:
                model[worker] |= set(chain[:length])
        case "evict":
            gone = with_followers(set(chain[length:]))
            assert await store.index.publish(worker, [], sorted(gone)) == (worker in model)
            if worker in model:
                model[worker] -= gone
        case "renew":
            assert await store.index.renew(worker) == (worker in model)
        case "forget":
            await store.index.forget(worker)
            model.pop(worker, None)
        case "lose":
            await store.lose_everything()
            model.clear()


def with_followers(blocks):
    """What a worker holds is closed: what follows an evicted block in any chain is evicted too."""
    return blocks.union(*(chain[leading(chain, set(chain) - blocks) :] for chain in TREE))


def leading(chain, held):
    return next((number for number, block in enumerate(chain) if block not in held), len(chain))
