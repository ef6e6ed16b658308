"""A client that says nothing, or too much, holds a connection for a bounded time; the others are served."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.gateway.connection import HEAD_BYTES_MAX, Connection
from services.gateway.http_server import Server, server_config
from tests.unit.gateway.in_memory_cluster import until

SOON_S = 0.15  # the bounds of these tests
REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello"


async def echo(
    scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """Answers with the body, "slow" after three times the bounds."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if message["type"] == "http.disconnect":
            return
    if body == b"slow!":
        await asyncio.sleep(3 * SOON_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(connections_max: int = 100) -> AsyncIterator[int]:
    config = server_config(echo, connections_max=connections_max)
    assert isinstance(config.http, type)
    config.http.head_s = config.http.body_s = SOON_S  # type: ignore[attr-defined]
    server = Server(config)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def said(self) -> bytes:
        """All that the server says until it closes the connection, within five seconds."""
        async with asyncio.timeout(5):
            return await self.reader.read()

    async def answer(self) -> bytes:
        """The body of one answer."""
        async with asyncio.timeout(5):
            head = await self.reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head
            return await self.reader.readexactly(5)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "beginning",
    [b"", b"\r\n\r\n", b"POST / HT", b"POST / HTTP/1.1\r\nhost: x\r\n", REQUEST[:-1]],
    ids=["nothing", "empty lines", "half a line", "half a head", "half a body"],
)
async def test_a_request_that_does_not_end_is_given_up(beginning: bytes) -> None:
    async with serving() as port, connected(port) as client:
        client.writer.write(beginning)
        assert (await client.said()).startswith(b"HTTP/1.1 408 ")


async def test_a_head_that_drips_is_given_up_however_lively_it_is() -> None:
    async with serving() as port, connected(port) as client:
        said = asyncio.create_task(client.said())
        client.writer.write(b"GET / HTTP/1.1\r\n")
        while not said.done():
            client.writer.write(b"a: b\r\n")
            await asyncio.sleep(SOON_S / 10)
        assert b" 408 " in await said


@pytest.mark.parametrize("line", [b"a: b\r\n", b"x"], ids=["many headers", "one header"])
async def test_a_head_without_end_is_given_up_before_it_fills_the_memory(line: bytes) -> None:
    async with serving() as port, connected(port) as client:
        client.writer.write(b"GET / HTTP/1.1\r\na: " + line * (HEAD_BYTES_MAX // len(line)))
        said = await client.said()
        assert said.startswith(b"HTTP/1.1 431 ")
        assert str(HEAD_BYTES_MAX) in json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_a_large_body_is_no_head() -> None:
    size = 3 * HEAD_BYTES_MAX
    async with serving() as port, connected(port) as client:
        client.writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
        assert (await client.said()).startswith(b"HTTP/1.1 200 ")


async def test_connections_beyond_the_bound_are_refused_and_room_comes_back() -> None:
    async with serving(connections_max=2) as port, connected(port) as first:
        async with connected(port) as second, connected(port) as third:
            assert (await third.said()).startswith(b"HTTP/1.1 503 ")
            for client in (first, second):
                client.writer.write(REQUEST)
                assert await client.answer() == b"hello"
        await asyncio.sleep(0.05)
        async with connected(port) as fourth:
            fourth.writer.write(REQUEST)
            assert await fourth.answer() == b"hello"


async def test_an_answer_may_take_longer_than_its_request() -> None:
    async with serving() as port, connected(port) as client:
        client.writer.write(REQUEST.replace(b"hello", b"slow!"))
        assert await client.answer() == b"slow!"


async def test_requests_behind_each_other_are_all_answered() -> None:
    async with serving() as port, connected(port) as client:
        slow = REQUEST.replace(b"hello", b"slow!")
        client.writer.write(slow + REQUEST + slow[:20])
        assert await client.answer() == b"slow!"
        assert await client.answer() == b"hello"
        client.writer.write(slow[20:])
        assert await client.answer() == b"slow!"


async def test_an_idle_connection_stays_open_for_the_next_request() -> None:
    async with serving() as port, connected(port) as client:
        for _ in range(2):
            client.writer.write(REQUEST)
            assert await client.answer() == b"hello"
            await asyncio.sleep(2 * SOON_S)


def test_production_bounds_leave_time_for_slow_networks() -> None:
    assert Connection.head_s >= 10
    assert Connection.body_s >= 60
