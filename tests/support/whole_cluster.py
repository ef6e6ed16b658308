"""Whole workers and gateways in this process, over any index and membership: the production classes, real
gRPC, and an arithmetic model instead of engine processes.

In tests/support/in_process_cluster.py links can be cut and engines stopped; here workers announce
themselves and publish their caches, so that a store can be taken from them, and gateways come and go.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from prometheus_client import CollectorRegistry

from services.core.clock import Clock, SystemClock
from services.core.worker_report import Role, WorkerKey
from services.engine.incarnation import random_epoch
from services.engine.messages import EngineSetup, Report
from services.gateway.api.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.served_model import ServedModel
from services.gateway.workers.grpc_worker_client import GrpcWorkerClient
from services.history.memory_history import MemoryHistory
from services.index.protocol import PrefixIndex
from services.membership.protocol import Membership
from services.worker.config import WorkerConfig
from services.worker.http import Check, StatusServer
from services.worker.identity import WorkerIdentity
from services.worker.main import Surroundings, Worker
from tests.support.completions import MODEL
from tests.support.in_process_engine import VOCAB, InProcessEngine, compatibility, geometry

BLOCKS = 512
POLL_S = 0.02


class Engine(InProcessEngine):
    async def start(self, setup: EngineSetup) -> None:
        pass

    async def stop(self) -> None:
        pass


class NoStatusServer(StatusServer):
    def __init__(self, host: str, port: int, registry: CollectorRegistry, checks: dict[str, Check]) -> None:
        self.port = 0

    def close(self) -> None:
        pass


class Stores:
    """Where the parts of a cluster get their connections to what it shares."""

    def __init__(self, index: Callable[[], PrefixIndex], membership: Callable[[], Membership]) -> None:
        self.index, self.membership = index, membership


class WholeCluster:
    def __init__(self, stores: Stores, stack: AsyncExitStack) -> None:
        self._stores, self._stack = stores, stack
        self._clock = SystemClock()
        self.engines: dict[str, Engine] = {}
        self.gateways: list[Gateway] = []

    async def start_worker(self, name: str, role: Role) -> None:
        def new_engine(sequences_max: int, on_report: Callable[[Report], None], clock: Clock) -> Engine:
            self.engines[name] = Engine(blocks=BLOCKS, on_report=on_report)
            return self.engines[name]

        surroundings = Surroundings(
            self._stores.index(),
            self._stores.membership(),
            new_engine=new_engine,
            new_status_server=NoStatusServer,
        )
        config = WorkerConfig(role=role, port=0, transports="grpc", drain_grace_s=0.0)
        worker, stop = Worker(config, _identity(name), surroundings), asyncio.Event()
        life = asyncio.create_task(worker.serve(stop))

        async def end() -> None:
            stop.set()
            await life

        self._stack.push_async_callback(end)

    @asynccontextmanager
    async def gateway(self, model: ServedModel, **config: Any) -> AsyncIterator[httpx.AsyncClient]:
        """One that has just started and knows all workers."""
        client, index, membership = GrpcWorkerClient(), self._stores.index(), self._stores.membership()
        settings = GatewayConfig(**{"route_split": "always", "seed": 1, **config})
        history = MemoryHistory(self._clock, ttl_s=3600)
        gateway = Gateway(settings, model, membership, index, client, history, self._clock)
        self.gateways.append(gateway)
        following = asyncio.create_task(gateway.view.follow(POLL_S))
        try:
            await until(lambda: len(gateway.view.reports) == len(self.engines))
            transport = httpx.ASGITransport(build_app(gateway), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=30) as http:
                yield http
        finally:
            following.cancel()
            await client.close()
            await index.close()
            await membership.close()
            self.gateways.remove(gateway)


@asynccontextmanager
async def whole_cluster(stores: Stores, prefill: int = 2, decode: int = 2) -> AsyncIterator[WholeCluster]:
    async with AsyncExitStack() as stack:
        cluster = WholeCluster(stores, stack)
        for number in range(prefill):
            await cluster.start_worker(f"p{number}", "prefill")
        for number in range(decode):
            await cluster.start_worker(f"d{number}", "decode")
        yield cluster


def _identity(name: str) -> WorkerIdentity:
    return WorkerIdentity(
        key=WorkerKey(name, random_epoch()),
        files=SimpleNamespace(path=Path(), config=SimpleNamespace(vocab_size=VOCAB)),  # type: ignore[arg-type]
        served_model=MODEL,
        geometry=geometry(BLOCKS),
        compatibility=compatibility(),
        context_tokens_max=400,
        threads=1,
    )


async def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
