"""A prefill and a decode worker in this process: real services, gRPC and engines, an arithmetic model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from services.core.clock import SystemClock
from services.core.errors import DiptychError
from services.core.worker_report import WorkerKey
from services.decode.sequence import DecodeParts
from services.decode.service import DecodeService
from services.engine.incarnation import Incarnation
from services.engine.submission import SequenceBounds
from services.prefill.service import PrefillService
from services.transfer.grpc_transport import GrpcKvTransport, KvTransferService
from services.transfer.lease import LeaseEnd, LeaseTable
from services.transfer.pool_memory import PoolMemory
from services.transfer.receive import Received
from services.transfer.server import KvServer
from services.wire.channel import listen, new_server, open_channel
from services.wire.generated import transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.support.in_process_engine import InProcessEngine, compatibility

BOUNDS = SequenceBounds(vocab_size=50_000, context_tokens_max=200)


class PrefillWorker:
    def __init__(
        self, blocks: int = 64, lease_ttl_s: float = 5.0, pull_wait_s: float = 0.3, block_size: int = 4
    ) -> None:
        clock = SystemClock()
        self.engine = InProcessEngine(blocks, block_size=block_size)
        self.incarnation = Incarnation(WorkerKey("p", 11))
        self.failures: list[DiptychError] = []
        memory = PoolMemory(self.engine.geometry, self.engine.pool)
        self.lease_ends: list[LeaseEnd] = []
        self.leases = LeaseTable(clock, lease_ttl_s, self._lease_ended, memory.generation)
        self._service = PrefillService(
            self.engine, self.leases, self.incarnation, BOUNDS, clock, pull_wait_s, self.failures.append
        )
        self._kv = KvServer(self.leases, memory, compatibility(block_size), 11, clock, pull_wait_s)

    def _lease_ended(self, transfer_id: str, how: LeaseEnd) -> None:
        self.engine.drop(transfer_id)
        self.lease_ends.append(how)

    def attach(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillServicer_to_server(self._service, server)
        transfer_pb2_grpc.add_KvTransferServicer_to_server(KvTransferService(self._kv), server)


class DecodeWorker:
    def __init__(self, blocks: int = 64, block_size: int = 4) -> None:
        self.engine = InProcessEngine(blocks, block_size=block_size)
        self.incarnation = Incarnation(WorkerKey("d", 22))
        self.received: list[Received] = []
        self.failures: list[DiptychError] = []
        self.broken_pulls: list[DiptychError] = []
        self._transport = GrpcKvTransport(compatibility(block_size))
        memory = PoolMemory(self.engine.geometry, self.engine.pool)
        self.parts = DecodeParts(
            self.engine,
            self._transport,
            memory,
            SystemClock(),
            self.received.append,
            self.failures.append,
            self.broken_pulls.append,
        )
        self._service = DecodeService(self.parts, self.incarnation, BOUNDS)

    def attach(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServicer_to_server(self._service, server)

    async def close(self) -> None:
        await self._transport.close()


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
        async with asyncio.timeout(5):
            while self.prefill.leases.open_leases or not all(map(_holds_nothing, self._engines())):
                await asyncio.sleep(0.002)
        for engine in self._engines():
            engine.engine.check_integrity()

    def _engines(self) -> list[InProcessEngine]:
        return [self.prefill.engine, self.decode.engine]


def _holds_nothing(handle: InProcessEngine) -> bool:
    gauges = handle.gauges
    return handle.idle.is_set() and gauges.blocks_free + gauges.blocks_cached == gauges.blocks_total


@asynccontextmanager
async def running_pair(
    prefill: PrefillWorker | None = None, decode: DecodeWorker | None = None
) -> AsyncIterator[Pair]:
    pair = Pair(prefill or PrefillWorker(), decode or DecodeWorker())
    servers, ports = [], []
    for worker in (pair.prefill, pair.decode):
        server = new_server()
        worker.attach(server)
        ports.append(listen(server, "127.0.0.1", 0))
        await server.start()
        servers.append(server)
    pair.prefill_address = f"127.0.0.1:{ports[0]}"
    pair._channels = [open_channel(f"127.0.0.1:{port}") for port in ports]
    try:
        yield pair
    finally:
        for channel in pair._channels:
            await channel.close()
        for server in servers:
            await server.stop(grace=0)
        await pair.decode.close()
