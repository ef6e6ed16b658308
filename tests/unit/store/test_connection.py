"""Every failure of Redis leaves a StoreConnection as one error, in bounded time."""

import asyncio
import contextlib
import os
import signal
import uuid

import pytest

from services.core.errors import ConfigError, StoreUnavailable
from services.store.connection import CONNECTIONS_MAX, Call, Script, StoreConnection
from services.store.embedded import EmbeddedValkey
from tests.support.redis_servers import KINDS, RedisCluster


@pytest.fixture
async def connect():
    opened = []

    def open_connection(url, timeout_s=5.0):
        opened.append(StoreConnection(url, timeout_s))
        return opened[-1]

    yield open_connection
    for connection in opened:
        await connection.close()


async def ping(connection):
    async with connection.client() as redis:
        return await redis.ping()


async def test_a_killed_server_is_unavailable_and_a_restarted_one_works_at_once(connect):
    with EmbeddedValkey() as valkey:
        connection = connect(valkey.url)
        # Several pooled connections: each of them must survive the restart.
        assert all(await asyncio.gather(*(ping(connection) for _ in range(4))))
        os.kill(valkey.pid, signal.SIGKILL)
        with pytest.raises(StoreUnavailable, match=rf"Redis at 127.0.0.1:{valkey.port} is unavailable"):
            await ping(connection)
        valkey.start(port=valkey.port)
        assert all(await asyncio.gather(*(ping(connection) for _ in range(4))))


@pytest.mark.parametrize("kind", KINDS)
async def test_many_may_make_the_first_call(connect, redis_url, kind):
    script = Script(f"return {uuid.uuid4().int % 1000} + redis.call('INCRBY', KEYS[1], 1)")
    for _ in range(2):
        connection, key = connect(redis_url(kind)), uuid.uuid4().hex
        answers = await asyncio.gather(*(connection.run(Call(script, [key])) for _ in range(50)))
        assert len(set(answers)) == 50


async def test_a_server_that_restarted_between_two_calls_is_not_noticed(connect):
    with EmbeddedValkey() as valkey:
        connection = connect(valkey.url)
        assert await ping(connection)
        valkey.start(port=valkey.port)
        assert await ping(connection)


async def test_a_suspended_server_is_unavailable_and_its_late_answers_confuse_nobody(connect):
    with EmbeddedValkey() as valkey:
        connection = connect(valkey.url, timeout_s=0.5)
        async with connection.client() as redis:
            await redis.set("key", "value")
        os.kill(valkey.pid, signal.SIGSTOP)
        with pytest.raises(StoreUnavailable):
            await ping(connection)
        os.kill(valkey.pid, signal.SIGCONT)
        assert await ping(connect(valkey.url))  # it is awake
        async with connection.client() as redis:
            assert await redis.get("key") == b"value"


async def test_more_calls_than_connections_wait_their_turn(connect, valkey_url):
    connection = connect(valkey_url)
    assert all(await asyncio.gather(*(ping(connection) for _ in range(CONNECTIONS_MAX * 4))))


async def test_an_error_answer_is_the_same_error(connect, valkey_url):
    connection = connect(valkey_url)
    with pytest.raises(StoreUnavailable, match="unknown command"):
        async with connection.client() as redis:
            await redis.execute_command("NOSUCH")


async def test_errors_do_not_print_the_password(connect):
    connection = connect("redis://user:hunter2@127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable) as caught:
        await ping(connection)
    assert "hunter2" not in str(caught.value)


def test_another_scheme_is_a_configuration_error():
    with pytest.raises(ConfigError, match="--redis"):
        StoreConnection("http://127.0.0.1:6379")


async def test_a_unix_socket_is_named_in_errors(connect):
    connection = connect("unix:///nowhere/valkey.sock")
    with pytest.raises(StoreUnavailable, match=r"/nowhere/valkey\.sock"):
        await ping(connection)


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_cluster_is_found_out_by_itself(connect, redis_url, kind, protocol):
    connection = connect(f"{redis_url(kind)}?protocol={protocol}")
    assert await connection.is_cluster() == kind.endswith("cluster")
    assert (await connection.version()).startswith(kind.removesuffix(" cluster"))
    key = f"{{{uuid.uuid4().hex}}}"
    assert await connection.run(Call(Script("return redis.call('INCR', KEYS[1])"), [key])) == 1


async def test_a_user_who_may_touch_the_clusters_keys_only_needs_no_more(connect):
    with EmbeddedValkey() as valkey:
        async with connect(valkey.url).client() as admin:
            await admin.execute_command(
                *("ACL", "SETUSER", "diptych", "on", ">secret", "~{diptych:*", "+@all", "-@dangerous")
            )
        connection = connect(f"redis://diptych:secret@127.0.0.1:{valkey.port}")
        assert await connection.run(Call(Script("return redis.call('INCR', KEYS[1])"), ["{diptych:a}"])) == 1
        with pytest.raises(StoreUnavailable, match="permission"):
            await connection.run(Call(Script("return redis.call('INCR', KEYS[1])"), ["other"]))


@pytest.mark.parametrize("kind", KINDS)
async def test_all_calls_are_answered_in_order_also_by_a_server_that_does_not_know_the_scripts(
    connect, redis_url, kind
):
    connection = connect(redis_url(kind))
    new = Script(f"return {{KEYS[1], ARGV[1]}} -- {uuid.uuid4().hex}")
    calls = [Call(new, [f"{{{number}}}"], number) for number in range(20)]
    for _ in range(2):
        expected = [[f"{{{number}}}".encode(), str(number).encode()] for number in range(20)]
        assert await connection.run_all(calls) == expected


async def test_a_cluster_whose_nodes_have_all_moved_is_found_again_by_its_url(connect):
    with RedisCluster() as cluster:
        connection = connect(cluster.url)
        script = Script("return 1")
        assert await connection.run(Call(script, ["{a}"])) == 1
        port = cluster.nodes[0].port
    with pytest.raises(StoreUnavailable):
        await connection.run(Call(script, ["{a}"]))
    with EmbeddedValkey() as other:
        other.start(port=port)
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    assert await connection.run(Call(script, ["{a}"])) == 1
                    break
        assert not await connection.is_cluster()
