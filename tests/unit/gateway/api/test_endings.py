"""Answers that end against their will: a client that does not read, a gateway that shuts down."""

import asyncio
import json
from collections.abc import Callable

import pytest

from services.gateway.api import exchange
from services.gateway.api.app import build_app
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.in_memory_cluster import MODEL

HEADERS = [(b"content-type", b"application/json")]


class Client:
    """One ASGI exchange by hand: a client that reads what it wants to."""

    def __init__(self, cluster, reads: Callable[[int], bool] = lambda number: True, **body: object) -> None:
        self.sent: list[dict] = []
        self._reads = reads
        self._body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 100, **body}).encode()
        path = "/v1/completions"
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"}
        scope |= {
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
        }
        scope |= {"headers": HEADERS, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
        self._asked = False
        self.exchange = asyncio.create_task(build_app(cluster.gateway)(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        return await asyncio.get_running_loop().create_future()

    async def _send(self, message: dict) -> None:
        if not self._reads(len(self.sent)):
            await asyncio.get_running_loop().create_future()
        self.sent.append(message)

    async def until_sent(self, messages: int) -> None:
        async with asyncio.timeout(10):
            while len(self.sent) < messages:
                await asyncio.sleep(0.002)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


async def test_a_client_that_stops_reading_does_not_hold_its_place(start_cluster, monkeypatch) -> None:
    monkeypatch.setattr(exchange, "SEND_GRACE_S", 0.1)
    cluster = await start_cluster(request_timeout_s=0.2)
    client = Client(cluster, reads=lambda number: number < 3, stream=True)
    await asyncio.wait([client.exchange], timeout=10)
    assert client.exchange.done()
    assert cluster.gateway.metrics.inflight._value.get() == 0
    assert cluster.workers.running == []


@pytest.fixture
async def shutting_down(cluster):
    """Its answers stand still after two tokens, and the grace period is about to end."""
    cluster.workers.script(ANY_WORKER, "decode", Fault(None, after_tokens=1))
    cluster.gateway.draining = True
    return cluster


async def test_a_stream_cut_by_the_shutdown_says_so(shutting_down) -> None:
    client = Client(shutting_down, stream=True)
    await client.until_sent(3)
    client.exchange.cancel()
    await asyncio.wait([client.exchange], timeout=10)
    last_event = client.text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert "shutting down" in json.loads(last_event)["error"]["message"]
    assert client.sent[-1]["more_body"] is False


async def test_a_whole_answer_cut_by_the_shutdown_is_a_503(shutting_down) -> None:
    client = Client(shutting_down)
    while len(shutting_down.workers.running) != 1:
        await asyncio.sleep(0.002)
    client.exchange.cancel()
    await asyncio.wait([client.exchange], timeout=10)
    assert client.sent[0]["status"] == 503
    assert b"retry-after" in dict(client.sent[0]["headers"])
    assert "shutting down" in json.loads(client.text)["error"]["message"]
