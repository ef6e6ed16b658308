"""Every failure of Redis leaves a StoreConnection as one error, in bounded time."""

import asyncio
import os
import signal

import pytest

from services.core.errors import ConfigError, StoreUnavailable
from services.store.connection import CONNECTIONS_MAX, StoreConnection
from services.store.embedded import EmbeddedValkey


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
