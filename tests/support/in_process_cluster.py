"""A whole cluster in this process: gateway and workers as in production, over HTTP and gRPC, with an
arithmetic model. Between any two of them there is a network link that a test controls.

    http ── Gateway ──TcpProxy── WorkerServer "p0", "p1"  (prefill)
                 └────TcpProxy── WorkerServer "d0", "d1"  (decode) ──TcpProxy── "p0", "p1"
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx

from services.core.clock import SystemClock
from services.core.worker_report import Role, WorkerKey, WorkerReport
from services.engine.incarnation import Incarnation
from services.gateway.api.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.served_model import ServedModel
from services.gateway.workers.grpc_worker_client import GrpcWorkerClient
from services.history.memory_history import MemoryHistory
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from services.wire.channel import Network, open_channel
from services.worker.config import WorkerConfig
from services.worker.grpc_server import WorkerServer
from services.worker.identity import WorkerIdentity
from services.worker.metrics import WorkerMetrics
from services.worker.transports import open_transports
from tests.support.completions import MODEL, Answer, complete
from tests.support.in_process_engine import VOCAB, InProcessEngine, compatibility
from tests.support.scrape import Scrape
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.unit.gateway.in_memory_cluster import over_network

CONTEXT_TOKENS = 400
POLL_S = 0.02


class Waits(NamedTuple):
    """As in WorkerConfig."""

    pull_wait_s: float
    lease_ttl_s: float


class InProcessWorker:
    """One life of a worker."""

    def __init__(
        self, role: Role, key: WorkerKey, port: int, network: Network, blocks: int, waits: Waits
    ) -> None:
        self.role, self.key, self.blocks = role, key, blocks
        self.metrics = WorkerMetrics()
        self.engine = InProcessEngine(blocks, on_report=self.metrics.on_report)
        config = WorkerConfig(
            role=role, port=port, lease_ttl_s=waits.lease_ttl_s, pull_wait_s=waits.pull_wait_s
        )
        self.server = WorkerServer(
            config,
            self._identity(),
            self.engine,
            Incarnation(key, role, SystemClock(), lease_s=3600),  # nobody beats for it
            self.metrics,
            SystemClock(),
            network,
            open_transports,
            on_role=lambda: None,
        )

    async def start(self) -> None:
        await self.server.start()
        self._sweeping = asyncio.create_task(self.server.leases.expire_forever())

    async def die(self) -> None:
        """Every connection to it breaks. What its engine held is gone with it."""
        self._sweeping.cancel()
        await self.server.stop()

    def count(self, name: str, **labels: str) -> float:
        """A counter of the worker, as /metrics shows it."""
        return self.metrics.registry.get_sample_value(f"diptych_{name}_total", labels) or 0.0

    @property
    def held(self) -> bool:
        gauges = self.engine.gauges
        blocks = gauges.blocks_free + gauges.blocks_cached == gauges.blocks_total
        return bool(self.server.leases.open_leases) or not self.engine.idle.is_set() or not blocks

    def report(self) -> WorkerReport:
        return WorkerReport(
            worker_id=self.key.worker_id,
            epoch=self.key.epoch,
            role=self.role,
            state="ready",
            address=self.server.address,
            served_model=MODEL,
            compatibility=compatibility(),
            context_tokens_max=CONTEXT_TOKENS,
            blocks_total=self.blocks,
            blocks_free=self.blocks,
        )

    def _identity(self) -> WorkerIdentity:
        config = SimpleNamespace(vocab_size=VOCAB)
        return WorkerIdentity(
            key=self.key,
            files=SimpleNamespace(config=config),  # type: ignore[arg-type]
            served_model=MODEL,
            geometry=self.engine.geometry,
            compatibility=compatibility(),
            context_tokens_max=CONTEXT_TOKENS,
            threads=1,
        )


class InProcessCluster:
    """Two prefill and two decode workers behind one gateway; every request goes through two."""

    def __init__(self, stack: AsyncExitStack, blocks: int, waits: Waits) -> None:
        self._stack, self._blocks, self._waits = stack, blocks, waits
        self._epochs = iter(range(1, 1_000))
        self._addresses: dict[str, str] = {}  # of workers, by id; a restarted one keeps its own
        self.workers: dict[str, InProcessWorker] = {}  # that are alive
        self.links: dict[tuple[str, str], TcpProxy] = {}  # from, to
        self.membership = MemoryMembership(SystemClock(), ttl_s=3600)

    def link(self, reader: str, source: str) -> TcpProxy:
        """The network between two workers, or from "gateway", as `reader` opens connections over it."""
        return self.links[reader, source]

    async def start(self, worker_id: str) -> None:
        """Start a worker, or start it again at its old address, with a new epoch."""
        role: Role = "prefill" if worker_id.startswith("p") else "decode"
        port = int(self._addresses.get(worker_id, ":0").rpartition(":")[2])
        key = WorkerKey(worker_id, next(self._epochs))
        network = self.network(worker_id)
        worker = self.workers[worker_id] = InProcessWorker(
            role, key, port, network, self._blocks, self._waits
        )
        await worker.start()
        self._addresses[worker_id] = worker.server.address
        await self.announce(worker_id)

    async def announce(self, worker_id: str) -> None:
        await self.membership.announce(self.workers[worker_id].report())

    async def kill(self, worker_id: str) -> None:
        """Its lease goes on: nobody is told."""
        await self.workers.pop(worker_id).die()

    async def remove(self, worker_id: str) -> None:
        """Killed, and known to be."""
        key = self.workers[worker_id].key
        await self.kill(worker_id)
        await self.membership.leave(key)
        await self.gateway.view.refresh()

    async def add_links(self) -> None:
        for reader in ["gateway", *self.workers]:
            for source in self.workers:
                link = await self._stack.enter_async_context(tcp_proxy(self._addresses[source]))
                self.links[reader, source] = link

    def network(self, reader: str) -> Network:
        return Network(open_channel=lambda address: open_channel(self._resolve(reader, address)))

    def _resolve(self, reader: str, address: str) -> str:
        source = next(worker for worker, known in self._addresses.items() if known == address)
        return self.links[reader, source].address

    def retries(self, error: str) -> float:
        """Attempts that failed so, as the gateway counts them."""
        return Scrape.parse(self.gateway.metrics.text().decode()).value(
            "diptych_gateway_retries_total", error=error
        )

    def count(self, name: str, **labels: str) -> float:
        """A counter summed over the workers that are alive."""
        return sum(worker.count(name, **labels) for worker in self.workers.values())

    async def until_quiet(self, within_s: float = 5.0) -> None:
        """Wait until no worker that is alive holds anything, and prove that their books are right."""
        async with asyncio.timeout(within_s):
            while any(worker.held for worker in self.workers.values()):
                await asyncio.sleep(0.002)
        for worker in self.workers.values():
            worker.engine.engine.check_integrity()

    async def answer(self, **body: Any) -> Answer:
        """A greedy answer of exactly `max_tokens`, unless `body` says otherwise."""
        asked = {"model": MODEL, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return await complete(self.http, asked | {"timings": True} | body)


@asynccontextmanager
async def in_process_cluster(
    model: ServedModel,
    prefill: int = 2,
    decode: int = 2,
    blocks: int = 64,
    pull_wait_s: float = 2.0,
    lease_ttl_s: float = 2.0,  # longer than a broken pull is tried again
    **config: Any,
) -> AsyncIterator[InProcessCluster]:
    async with AsyncExitStack() as stack:
        cluster = InProcessCluster(stack, blocks, Waits(pull_wait_s, lease_ttl_s))
        for worker_id in [f"p{n}" for n in range(prefill)] + [f"d{n}" for n in range(decode)]:
            await cluster.start(worker_id)
        await cluster.add_links()
        settings = GatewayConfig(**{"route_split": "always", "seed": 1, **config})
        client, clock = GrpcWorkerClient(cluster.network("gateway")), SystemClock()
        index = MemoryPrefixIndex(clock, ttl_s=3600)
        cluster.gateway = Gateway(
            settings, model, cluster.membership, index, client, MemoryHistory(clock, ttl_s=3600), clock
        )
        await cluster.gateway.view.refresh()
        following = asyncio.create_task(cluster.gateway.view.follow(POLL_S))
        cluster.http = await stack.enter_async_context(over_network(build_app(cluster.gateway)))
        cluster.http.timeout = httpx.Timeout(30)
        try:
            yield cluster
            await cluster.until_quiet()
        finally:
            following.cancel()
            await client.close()
            for worker_id in list(cluster.workers):
                await cluster.kill(worker_id)


async def until(condition: Callable[[], object]) -> None:
    """Wait, ten seconds at most, until it is true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)
