"""What only the Redis index has to prove: failures of the server, and its round trips."""

import os
import signal
import uuid

import pytest
import redis.asyncio

from services.core.block_hash import chain_hashes
from services.core.errors import StoreUnavailable
from services.core.worker_report import WorkerKey
from services.index.redis_index import RedisPrefixIndex
from services.store.embedded import EmbeddedValkey

CHAIN = chain_hashes(list(range(64)), block_size=4, root=b"root")
WORKERS = [WorkerKey(f"w{number}", number) for number in range(8)]
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


async def test_a_killed_server_raises_from_every_call_and_a_restarted_one_is_filled_again(valkey, index):
    await index.publish(A, CHAIN, [])
    os.kill(valkey.pid, signal.SIGKILL)
    calls = (
        lambda: index.locate(CHAIN, [A]),
        lambda: index.publish(A, CHAIN, []),
        lambda: index.renew(A),
        lambda: index.forget(WORKERS[1]),
    )
    for call in calls:
        with pytest.raises(StoreUnavailable):
            await call()
    valkey.start(port=valkey.port)
    assert await index.locate(CHAIN, [A]) == {A: 0}
    assert not await index.renew(A)
    await index.publish(A, CHAIN, [])
    assert await index.renew(A)
    assert await index.locate(CHAIN, [A]) == {A: len(CHAIN)}


async def test_an_increment_that_failed_is_not_covered_up_by_later_ones(valkey, index):
    """The server keeps its data here (it only hangs), so nothing but the failure tells of the gap."""
    hasty = RedisPrefixIndex(valkey.url, timeout_s=0.5)
    await hasty.publish(A, CHAIN[:2], [])
    os.kill(valkey.pid, signal.SIGSTOP)
    with pytest.raises(StoreUnavailable):
        await hasty.publish(A, CHAIN[2:4], CHAIN[:1])
    os.kill(valkey.pid, signal.SIGCONT)
    assert await index.locate(CHAIN, WORKERS) is not None  # it is awake
    await hasty.publish(A, CHAIN[4:6], [])
    assert not await hasty.renew(A)
    await hasty.publish(A, CHAIN[:3], [])
    assert await hasty.renew(A)
    assert await hasty.locate(CHAIN, [A]) == {A: 3}
    await hasty.close()


async def test_locating_in_all_workers_is_one_command(valkey, index):
    for worker in WORKERS:
        await index.publish(worker, CHAIN, [])
    await index.locate(CHAIN, WORKERS)  # loads the script
    async with redis.asyncio.Redis.from_url(valkey.url) as observer:
        await observer.config_resetstat()
        await index.locate(CHAIN, WORKERS)
        called = await observer.info("commandstats")
    # The script's own probes are counted too, but cross no wire.
    assert called["cmdstat_evalsha"]["calls"] == 1
    assert set(called) <= {"cmdstat_evalsha", "cmdstat_sismember", "cmdstat_config|resetstat"}


async def test_namespaces_keep_clusters_apart(valkey_url):
    ours, theirs = (RedisPrefixIndex(valkey_url, timeout_s=10.0, namespace=uuid.uuid4().hex) for _ in "ab")
    await ours.publish(A, CHAIN, [])
    assert await theirs.locate(CHAIN, [A]) == {A: 0}
    await ours.close()
    await theirs.close()
