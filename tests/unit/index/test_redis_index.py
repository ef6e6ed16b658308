"""What only the Redis index has to prove: failures of the server, its memory, and its round trips."""

import asyncio
import contextlib
import os
import signal
import time
import uuid

import pytest
import redis.asyncio
from redis.crc import key_slot

from services.core.block_hash import chain_hashes
from services.core.errors import StoreFull, StoreUnavailable
from services.core.worker_report import WorkerKey
from services.index.redis_index import SHARDS, RedisPrefixIndex
from services.store.embedded import EmbeddedValkey
from tests.support.redis_binary import redis_server
from tests.support.redis_servers import SLOTS, RedisCluster

CHAIN = chain_hashes(list(range(64)), block_size=4, root=b"root")
WORKERS = [WorkerKey(f"w{number}", number) for number in range(6 * len(SHARDS))]
A = WORKERS[0]


@pytest.fixture
def valkey():
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
async def index(valkey):
    index = RedisPrefixIndex(valkey.url, timeout_s=5.0)
    yield index
    await index.close()


async def hold(index, worker, blocks=CHAIN):
    await index.begin(worker)
    assert await index.publish(worker, blocks, [])


def every_call(index):
    return (
        lambda: index.locate(CHAIN, WORKERS),
        lambda: index.begin(A),
        lambda: index.publish(A, CHAIN, []),
        lambda: index.renew(A),
        lambda: index.forget(A),
    )


async def test_a_killed_server_raises_from_every_call_and_a_restarted_one_is_filled_again(valkey, index):
    await hold(index, A)
    os.kill(valkey.pid, signal.SIGKILL)
    for call in every_call(index):
        with pytest.raises(StoreUnavailable):
            await call()
    valkey.start(port=valkey.port)
    assert await index.locate(CHAIN, [A]) == {A: 0}
    assert not await index.renew(A)
    await hold(index, A)
    assert await index.renew(A)
    assert await index.locate(CHAIN, [A]) == {A: len(CHAIN)}


async def test_a_new_gateway_finds_all_at_once(valkey, index):
    await hold(index, A)
    restarted = RedisPrefixIndex(valkey.url, timeout_s=5.0)
    assert await restarted.locate(CHAIN, [A]) == {A: len(CHAIN)}
    await restarted.close()


async def test_locating_in_all_workers_is_one_command(valkey, index):
    for worker in WORKERS:
        await hold(index, worker)
    await index.locate(CHAIN, WORKERS)  # loads the script
    async with redis.asyncio.Redis.from_url(valkey.url) as observer:
        await observer.config_resetstat()
        await index.locate(CHAIN, WORKERS)
        called = await observer.info("commandstats")
    # The script's own probes are counted too, but cross no wire.
    assert called["cmdstat_evalsha"]["calls"] == 1
    assert set(called) <= {"cmdstat_evalsha", "cmdstat_sismember", "cmdstat_config|resetstat"}
    # Workers that hold equally much are looked at once or twice each, whatever the chain's length.
    assert called["cmdstat_sismember"]["calls"] <= 2 * len(WORKERS) + 8


async def test_namespaces_keep_clusters_apart(valkey_url):
    ours, theirs = (RedisPrefixIndex(valkey_url, timeout_s=10.0, namespace=uuid.uuid4().hex) for _ in "ab")
    await hold(ours, A)
    assert await theirs.locate(CHAIN, [A]) == {A: 0}
    await ours.close()
    await theirs.close()


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_a_block_takes_less_than_a_hundred_bytes(redis_url, kind):
    blocks = chain_hashes(list(range(20_000)), block_size=1, root=b"root")
    index = RedisPrefixIndex(redis_url(kind), timeout_s=10.0, namespace=uuid.uuid4().hex)
    async with redis.asyncio.Redis.from_url(redis_url(kind)) as observer:
        await hold(index, A, blocks)
        entry = index._keys(A)[0]
        assert 0 < await observer.memory_usage(entry, samples=0) < 100 * len(blocks)
        await index.forget(A)
        assert not await observer.exists(entry)
    await index.close()


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_a_server_without_memory_refuses_blocks_and_still_does_everything_else(redis_url, kind):
    redis_url(kind)  # skips where there is none
    with EmbeddedValkey(redis_server() if kind == "redis" else None, ["--maxmemory", "8mb"]) as small:
        index = RedisPrefixIndex(small.url, timeout_s=5.0)
        await hold(index, A)
        for worker in WORKERS[1:]:
            await index.begin(worker)

        async def fill():
            for first in range(0, 10_000_000, 10_000):
                more = chain_hashes(list(range(first, first + 10_000)), block_size=1, root=b"x")
                await index.publish(WORKERS[1], more, [])

        with pytest.raises(StoreFull, match="maxmemory"):
            await fill()
        assert await index.locate(CHAIN, [A]) == {A: len(CHAIN)}
        assert await index.renew(A)
        assert await index.publish(A, [], CHAIN[4:])
        assert await index.locate(CHAIN, [A]) == {A: 4}
        await index.begin(WORKERS[1])  # which gives its memory back, in the background
        async with asyncio.timeout(10):
            while await index.locate(CHAIN, [WORKERS[1]]) != {WORKERS[1]: len(CHAIN)}:
                with contextlib.suppress(StoreFull):
                    await index.publish(WORKERS[1], CHAIN, [])
        await index.close()


@pytest.mark.parametrize("namespace", ["diptych", "a", "another cluster 7"])
def test_the_shards_are_in_eight_equal_parts_of_a_clusters_slots(namespace):
    index = RedisPrefixIndex("redis://127.0.0.1:1", namespace=namespace)
    slots = [key_slot(index._shard_key(number).encode()) for number in range(len(SHARDS))]
    assert sorted(slot * 8 // SLOTS for slot in slots) == list(range(8))


@pytest.fixture(scope="module")
def cluster():
    with RedisCluster() as cluster:
        yield cluster


class TestOnACluster:
    @pytest.fixture
    async def index(self, cluster):
        index = RedisPrefixIndex(cluster.url, timeout_s=2.0, namespace=uuid.uuid4().hex)
        for worker in WORKERS:
            await hold(index, worker)
        yield index
        await index.close()

    async def test_every_node_has_some_of_the_entries(self, cluster, index):
        for node in cluster.nodes:
            async with redis.asyncio.Redis.from_url(node.url) as client:
                assert len([key async for key in client.scan_iter(f"{{{index._namespace}:*")]) > 5

    async def test_a_look_up_is_one_command_for_each_shard(self, cluster, index):
        await index.locate(CHAIN, WORKERS)
        clients = [redis.asyncio.Redis.from_url(node.url) for node in cluster.nodes]
        for client in clients:
            await client.config_resetstat()
        assert await index.locate(CHAIN, WORKERS) == dict.fromkeys(WORKERS, len(CHAIN))
        calls = 0
        for client in clients:
            called = await client.info("commandstats")
            assert set(called) <= {"cmdstat_evalsha", "cmdstat_sismember", "cmdstat_config|resetstat"}
            calls += called["cmdstat_evalsha"]["calls"]
            await client.aclose()
        assert calls == len(SHARDS)

    async def test_a_node_that_stands_still_is_an_error_in_time_and_its_late_answers_confuse_nobody(
        self, cluster, index
    ):
        hasty = RedisPrefixIndex(cluster.url, timeout_s=1.5, namespace=index._namespace)
        assert await hasty.locate(CHAIN, WORKERS) == dict.fromkeys(WORKERS, len(CHAIN))
        os.kill(cluster.nodes[1].pid, signal.SIGSTOP)
        try:
            for _ in range(2):
                started_s = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await hasty.locate(CHAIN, WORKERS)
                assert time.monotonic() - started_s < 10.0
        finally:
            os.kill(cluster.nodes[1].pid, signal.SIGCONT)
        cluster.await_joined()
        for length in (3, 5, 1):
            assert await hasty.locate(CHAIN[:length], WORKERS) == dict.fromkeys(WORKERS, length)
        await hasty.close()


async def test_a_failover_is_followed():
    with RedisCluster() as cluster:
        index = RedisPrefixIndex(cluster.url, timeout_s=5.0)
        for worker in WORKERS:
            await hold(index, worker)
        primary = cluster.nodes[0]
        cluster.fail_over(primary)
        primary.stop()
        assert await index.locate(CHAIN, WORKERS) == dict.fromkeys(WORKERS, len(CHAIN))
        for worker in WORKERS:
            assert await index.renew(worker)
        await index.close()


async def test_a_killed_node_of_a_cluster_is_an_error_in_time_from_every_call_that_needs_it():
    with RedisCluster() as cluster:
        index = RedisPrefixIndex(cluster.url, timeout_s=2.0)
        for worker in WORKERS:
            await hold(index, worker)
        os.kill(cluster.nodes[0].pid, signal.SIGKILL)  # the one that the URL names
        failed = 0
        for call in every_call(index):
            started_s = time.monotonic()
            try:
                await call()
            except StoreUnavailable:
                failed += 1
            assert time.monotonic() - started_s < 10.0
        assert failed
        await index.close()
