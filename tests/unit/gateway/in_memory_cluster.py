"""A whole gateway over in-memory twins, served over HTTP: what the gateway's tests talk to."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import httpx

from services.core.child_tasks import ChildTasks
from services.core.clock import SystemClock
from services.gateway.api.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.door.door import Locks
from services.gateway.gateway import Gateway
from services.gateway.http_server import Server, server_config
from services.gateway.served_model import ServedModel
from services.gateway.workers.memory_worker_client import MemoryWorkerClient
from services.history.memory_history import MemoryHistory
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from tests.unit.gateway.scripted_worker_server import report

MODEL = "SmolLM2-135M-Instruct"
ANSWER = "Paris is the capital of France, 日本 👍 says so."


class InMemoryCluster:
    """A gateway over in-memory twins, served over the network or in the process.

    Workers p1, p2 (prefill) and d1, d2 (decode) are alive unless `reports` says otherwise. The model
    answers every prompt with `answer` and the end token.
    """

    def __init__(
        self,
        model: ServedModel,
        config: GatewayConfig,
        answer: str = ANSWER,
        locks: Locks | None = None,
    ) -> None:
        self.clock = SystemClock()
        self.membership = MemoryMembership(self.clock, ttl_s=3600)
        self.index = MemoryPrefixIndex(self.clock, ttl_s=3600)
        end = min(model.tokenizer.end_token_ids)
        self.answer_ids = [*model.tokenizer.encode(answer, add_special_tokens=False), end]
        self.answers: dict[tuple[int, ...], list[int]] = {}  # by prompt, where it has one of its own
        self.workers = MemoryWorkerClient(lambda prompt: self.answers.get(tuple(prompt), self.answer_ids))
        self.history = MemoryHistory(self.clock, ttl_s=config.responses_ttl_s)
        stores = (self.membership, self.index, self.workers, self.history)
        self.gateway = Gateway(config, model, *stores, self.clock, locks)
        self.url = ""

    @asynccontextmanager
    async def serving(self, *reports, network: bool):
        for worker in reports:
            await self.membership.announce(worker)
        await self.gateway.view.refresh()
        await self.gateway.door.open()
        app = build_app(self.gateway)
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(ChildTasks())
            tasks.start(self.gateway.door.watch())
            self.http = await stack.enter_async_context(over_network(app) if network else in_process(app))
            self.url = str(self.http.base_url)
            yield self
        assert self.workers.running == [], "a call to a worker outlived its request"
        assert self.gateway.metrics.inflight._value.get() == 0

    def metric(self, name: str, **labels: str) -> float:
        value = self.gateway.metrics._registry.get_sample_value(f"diptych_gateway_{name}", labels)
        return value or 0.0


@asynccontextmanager
async def over_network(app):
    server = Server(server_config(app))
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            yield http
    finally:
        server.should_exit = True
        await task


def in_process(app) -> httpx.AsyncClient:
    """Faster, for tests that need neither a stream as it comes nor a client that goes."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


async def until(condition) -> None:
    """Wait, ten seconds at most, until it is true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def four_workers():
    prefills = [report(f"p{n}", "prefill", address=f"p{n}:1") for n in (1, 2)]
    return [*prefills, *(report(f"d{n}", "decode", address=f"d{n}:1") for n in (1, 2))]
