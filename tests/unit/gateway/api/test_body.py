"""Bodies take no more memory than they may, each one and all together."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from services.core.clock import SystemClock
from services.gateway.api.body import Bodies
from services.gateway.api.edge import Edge
from services.gateway.door.door import Door, LockedDoor
from services.gateway.metrics import GatewayMetrics
from services.keys.memory_keys import MemoryKeys
from services.keys.memory_limits import MemoryLimits
from tests.unit.gateway.in_memory_cluster import MODEL, over_network, until

BODY = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2}
LARGE = json.dumps(BODY | {"user": "x" * 900}).encode()


async def post(cluster, content):
    return await cluster.http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )


async def in_pieces(content: bytes, end: asyncio.Event):
    """All but the last byte, which comes with `end`."""
    yield content[:-1]
    await end.wait()
    yield content[-1:]


async def test_all_bodies_together_have_a_limit_and_those_that_end_make_room(start_cluster) -> None:
    cluster, end = await start_cluster(body_bytes_max=1000, bodies_bytes_max=1900), asyncio.Event()
    first = asyncio.create_task(post(cluster, in_pieces(LARGE, end)))
    await until(lambda: cluster.metric("body_bytes") == len(LARGE) - 1)
    refused = await post(cluster, LARGE)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert refused.headers["Retry-After"] == "1"
    assert (await post(cluster, json.dumps(BODY))).status_code == 200
    end.set()
    assert (await first).status_code == 200
    assert (await post(cluster, LARGE)).status_code == 200
    assert cluster.metric("body_bytes") == 0


async def test_a_body_whose_sender_goes_is_forgotten(start_cluster) -> None:
    cluster = await start_cluster()
    sending = asyncio.create_task(post(cluster, in_pieces(LARGE, asyncio.Event())))
    await until(lambda: cluster.metric("body_bytes") == len(LARGE) - 1)
    sending.cancel()
    await asyncio.wait([sending])
    await until(lambda: cluster.metric("body_bytes") == 0)


@asynccontextmanager
async def edge(door: Door):
    async def reads(scope, receive, send):
        body = await Request(scope, receive).body()
        await JSONResponse(len(body))(scope, receive, send)

    edge = Edge(reads, SystemClock(), door, Bodies(8 << 20, 1 << 28))
    async with over_network(edge) as http:
        yield http


@asynccontextmanager
async def locked_edge():
    door = LockedDoor(MemoryKeys(), MemoryLimits(SystemClock()), GatewayMetrics(), SystemClock())
    await door.open()
    async with edge(door) as http:
        yield http


@pytest.mark.parametrize("size", [0, 100, 8 << 20])
async def test_a_refused_client_learns_why_on_a_connection_that_stays(size) -> None:
    async with locked_edge() as http:
        for _ in range(2):
            answer = await http.post("/v1/completions", content=b"x" * size)
            assert answer.status_code == 401
            assert "Connection" not in answer.headers


async def test_who_sends_too_much_learns_it_and_not_that_the_connection_broke(cluster) -> None:
    for _ in range(2):
        assert (await post(cluster, b" " * (10 << 20))).status_code == 413


@pytest.mark.parametrize("length", [f"Content-Length: {1 << 40}", "Transfer-Encoding: chunked"])
async def test_a_refused_body_without_an_end_is_hung_up_on(length) -> None:
    async with locked_edge() as http, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: gateway\r\n{length}\r\n\r\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
        writer.close()


@pytest.mark.parametrize("size", [0, 1, 8 << 20])
async def test_a_body_that_is_wanted_is_read_whole_on_a_connection_that_stays(size) -> None:
    async with edge(Door()) as http:
        answer: httpx.Response = await http.post("/v1/completions", content=b"x" * size)
        assert answer.json() == size
        assert "Connection" not in answer.headers
