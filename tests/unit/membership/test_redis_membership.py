"""What only the Redis membership has to prove: foreign data, pruning, and failures of the server."""

import asyncio
import logging
import os
import signal
import uuid

import pytest
import redis.asyncio

from services.core.errors import StoreUnavailable
from services.membership.redis_membership import RedisMembership
from services.store.embedded import EmbeddedValkey

NAMESPACE = "test-membership"


@pytest.fixture
def valkey():
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
async def membership(valkey):
    membership = RedisMembership(valkey.url, ttl_s=60.0, timeout_s=5.0, namespace=NAMESPACE)
    yield membership
    await membership.close()


@pytest.fixture
async def client(valkey):
    async with redis.asyncio.Redis.from_url(valkey.url, decode_responses=True) as client:
        yield client


async def test_an_unreadable_report_is_skipped_with_one_line_until_it_is_readable_again(
    membership, client, report, caplog
):
    await membership.announce(report("good"))
    for written in ('{"worker_id": "new", "address": ["of", "a", "newer", "kind"]}', "not JSON"):
        await membership.announce(report("new"))
        assert await membership.workers() == [report("good"), report("new")]
        await client.set(f"{{{NAMESPACE}:members}}:new", written, px=60_000)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert await membership.workers() == [report("good")]
        assert [record.getMessage().split(",")[0] for record in caplog.records] == ["ignoring worker new"]


async def test_fields_of_a_newer_version_are_ignored(membership, client, report):
    await membership.announce(report("a"))
    written = await client.get(f"{{{NAMESPACE}:members}}:a")
    await client.set(f"{{{NAMESPACE}:members}}:a", '{"colour": "blue", ' + written[1:], px=60_000)
    assert await membership.workers() == [report("a")]


async def test_dead_ids_are_pruned(membership, client, report):
    await membership.announce(report("dead"))
    await membership.announce(report("alive"))
    await client.delete(f"{{{NAMESPACE}:members}}:dead")
    await membership.workers()
    assert await client.smembers(f"{{{NAMESPACE}:members}}") == {"alive"}


async def test_leaving_races_with_a_new_incarnation_and_never_removes_it(membership, report):
    for epoch in range(50):
        await membership.announce(report("a", epoch=epoch))
        await asyncio.gather(
            membership.leave(report("a", epoch=epoch).key),
            membership.announce(report("a", epoch=1000 + epoch)),
        )
        assert await membership.workers() == [report("a", epoch=1000 + epoch)]


async def test_listing_is_one_command(membership, client, report):
    for number in range(8):
        await membership.announce(report(f"w{number}"))
    await membership.workers()  # loads the script
    await client.config_resetstat()
    assert len(await membership.workers()) == 8
    called = await client.info("commandstats")
    # The script's own reads are counted too, but cross no wire.
    assert called["cmdstat_evalsha"]["calls"] == 1
    assert set(called) <= {"cmdstat_evalsha", "cmdstat_smembers", "cmdstat_get", "cmdstat_config|resetstat"}


async def test_a_killed_server_raises_from_every_call_and_a_restarted_one_works(valkey, membership, report):
    await membership.announce(report("a"))
    os.kill(valkey.pid, signal.SIGKILL)
    calls = (
        lambda: membership.workers(),
        lambda: membership.announce(report("a")),
        lambda: membership.leave(report("a").key),
    )
    for call in calls:
        with pytest.raises(StoreUnavailable):
            await call()
    valkey.start(port=valkey.port)
    assert await membership.workers() == []
    await membership.announce(report("a"))
    assert await membership.workers() == [report("a")]


async def test_namespaces_keep_clusters_apart(valkey_url, report):
    ours, theirs = (RedisMembership(valkey_url, timeout_s=10.0, namespace=uuid.uuid4().hex) for _ in "ab")
    await ours.announce(report("a"))
    assert await theirs.workers() == []
    await ours.close()
    await theirs.close()
