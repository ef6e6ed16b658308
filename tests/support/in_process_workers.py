"""A prefill and a decode worker in this process: real services, gRPC and engines, an arithmetic model."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc.aio

from services.core.clock import SystemClock
from services.core.errors import DiptychError
from services.core.worker_report import Role, WorkerKey
from services.decode.sequence import DecodeParts
from services.decode.service import DecodeService
from services.engine.incarnation import Incarnation
from services.engine.messages import Fetched, Landed, Report
from services.engine.submission import SequenceBounds
from services.prefill.service import PrefillService
from services.transfer.fetch import FetchObserver, PrefixFetched, PrefixFetcher
from services.transfer.grpc_transport import GrpcKvTransport, serve_kv
from services.transfer.lease import LeaseEnd, LeaseTable
from services.transfer.pool_memory import PoolMemory
from services.transfer.receive import Received
from services.transfer.server import KvServer
from services.wire.channel import TCP, Network
from services.wire.generated import worker_pb2, worker_pb2_grpc
from services.worker.lender import Lender
from tests.support.in_process_engine import InProcessEngine, compatibility

BOUNDS = SequenceBounds(vocab_size=50_000, context_tokens_max=200)


def incarnation(worker_id: str, epoch: int, role: Role) -> Incarnation:
    """One that never stands still: nobody beats here."""
    return Incarnation(WorkerKey(worker_id, epoch), role, SystemClock(), lease_s=3600.0)


class KvSide:
    """What every worker has: an engine, leases on its blocks, and transfers both ways."""

    def __init__(
        self,
        incarnation: Incarnation,
        blocks: int,
        lease_ttl_s: float,
        pull_wait_s: float,
        block_size: int,
        network: Network,
    ) -> None:
        clock = SystemClock()
        self.network = network
        self.engine = InProcessEngine(blocks, self._on_report, block_size=block_size)
        self.computed_tokens = 0  # of prompts
        self.memory = PoolMemory(self.engine.geometry, self.engine.pool)
        self.lease_ends: list[LeaseEnd] = []
        self.leases = LeaseTable(clock, lease_ttl_s, self._lease_ended, self.memory.generation)
        self.transport = GrpcKvTransport(compatibility(block_size), network)
        self.fetched: list[PrefixFetched] = []
        self.broken_pulls: list[DiptychError] = []
        self.ms_per_token = 0.0  # not measured
        self.fetcher = PrefixFetcher(
            self.transport,
            self.memory,
            clock,
            FetchObserver(
                landed=lambda seq_id, tokens, proven: self.engine.send(Landed(seq_id, tokens, proven)),
                ended=self._fetch_ended,
                broke=self.broken_pulls.append,
                compute_ms=lambda tokens, start: tokens * self.ms_per_token,
            ),
        )
        lender = Lender(self.engine, self.leases, clock)
        self._server = KvServer(
            self.leases,
            self.memory,
            compatibility(block_size),
            incarnation.is_current,
            clock,
            pull_wait_s,
            lender.lend,
        )

    def attach(self, server: grpc.aio.Server) -> None:
        serve_kv(self._server, server)

    def _on_report(self, report: Report) -> None:
        self.computed_tokens += report.step.prefill_tokens if report.step else 0

    def _lease_ended(self, transfer_id: str, how: LeaseEnd) -> None:
        self.fetcher.stop(transfer_id, then=lambda: self.engine.drop(transfer_id))
        self.lease_ends.append(how)

    def _fetch_ended(self, seq_id: str, fetched: PrefixFetched) -> None:
        self.engine.send(Fetched(seq_id))
        self.fetched.append(fetched)


class PrefillWorker:
    def __init__(
        self,
        blocks: int = 64,
        lease_ttl_s: float = 5.0,
        pull_wait_s: float = 0.3,
        block_size: int = 4,
        network: Network = TCP,
    ) -> None:
        self.incarnation = incarnation("p", 11, "prefill")
        self.kv = kv = KvSide(self.incarnation, blocks, lease_ttl_s, pull_wait_s, block_size, network)
        self.engine, self.leases, self.lease_ends = kv.engine, kv.leases, kv.lease_ends
        self.failures: list[DiptychError] = []
        self._service = PrefillService(
            kv.engine,
            kv.leases,
            self.incarnation,
            BOUNDS,
            SystemClock(),
            pull_wait_s,
            self.failures.append,
            kv.fetcher,
        )

    def attach(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillServicer_to_server(self._service, server)
        self.kv.attach(server)


class DecodeWorker:
    def __init__(self, blocks: int = 64, block_size: int = 4, network: Network = TCP) -> None:
        self.incarnation = incarnation("d", 22, "decode")
        self.kv = kv = KvSide(self.incarnation, blocks, 5.0, 0.3, block_size, network)
        self.engine, self.leases, self.broken_pulls = kv.engine, kv.leases, kv.broken_pulls
        self._transport = kv.transport
        self.received: list[Received] = []
        self.failures: list[DiptychError] = []
        self.parts = DecodeParts(
            kv.engine,
            kv.transport,
            kv.memory,
            SystemClock(),
            self.received.append,
            self.failures.append,
            self.broken_pulls.append,
            kv.fetcher,
        )
        self.service = DecodeService(self.parts, self.incarnation, BOUNDS)

    def attach(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServicer_to_server(self.service, server)
        self.kv.attach(server)


class Pair:
    """Both workers, and the gateway's stubs to them."""

    def __init__(self, prefill: PrefillWorker, decode: DecodeWorker) -> None:
        self.prefill, self.decode = prefill, decode

    def source(self) -> worker_pb2.KvSource:
        return worker_pb2.KvSource(worker_id="p", address=self.prefill_address, epoch=11)

    def run_prefill(
        self, sequence: worker_pb2.Sequence, expect_pull: bool = True
    ) -> "grpc.aio.UnaryUnaryCall[worker_pb2.PrefillRequest, worker_pb2.PrefillReply]":
        request = worker_pb2.PrefillRequest(sequence=sequence, epoch=11, expect_pull=expect_pull)
        return worker_pb2_grpc.PrefillStub(self._channels[0]).Run(request)

    def session(
        self,
    ) -> "grpc.aio.StreamStreamCall[worker_pb2.DecodeCommand, worker_pb2.DecodeEvents]":
        return worker_pb2_grpc.DecodeStub(self._channels[1]).Session()

    async def idle(self) -> None:
        """Wait until both workers hold nothing, and prove that their books are right."""
        await until(lambda: not self._open_leases() and all(map(_holds_nothing, self._engines())))
        for engine in self._engines():
            engine.engine.check_integrity()

    def _open_leases(self) -> int:
        return self.prefill.leases.open_leases + self.decode.leases.open_leases

    def _engines(self) -> list[InProcessEngine]:
        return [self.prefill.engine, self.decode.engine]


def _holds_nothing(handle: InProcessEngine) -> bool:
    gauges = handle.gauges
    return handle.idle.is_set() and gauges.blocks_free + gauges.blocks_cached == gauges.blocks_total


@asynccontextmanager
async def running_pair(
    prefill: PrefillWorker | None = None, decode: DecodeWorker | None = None, gateway: Network = TCP
) -> AsyncIterator[Pair]:
    """`gateway`: how the stubs reach the workers."""
    pair = Pair(prefill or PrefillWorker(), decode or DecodeWorker())
    servers, ports = [], []
    for worker in (pair.prefill, pair.decode):
        server = worker.kv.network.new_server()
        worker.attach(server)
        ports.append(worker.kv.network.listen(server, "127.0.0.1", 0))
        await server.start()
        servers.append(server)
    pair.prefill_address, pair.decode_address = (f"127.0.0.1:{port}" for port in ports)
    pair._channels = [gateway.open_channel(f"127.0.0.1:{port}") for port in ports]
    try:
        yield pair
    finally:
        for channel in pair._channels:
            await channel.close()
        for server in servers:
            await server.stop(grace=0)
        for worker in (pair.prefill, pair.decode):
            await worker.kv.transport.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait, five seconds at most, until it is true."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)
