"""Workers over gRPC: one channel per address, one decode session per incarnation of a worker."""

import asyncio
from collections.abc import Callable, Collection

import grpc
import grpc.aio

from services.core.errors import WorkerLost
from services.core.worker_report import WorkerKey, WorkerReport
from services.gateway.workers.decode_session import DecodeSession
from services.gateway.workers.nonsense import nonsense
from services.gateway.workers.sequence_wire import prefill_from_wire, sequence_to_wire
from services.gateway.workers.worker_client import DecodeEvent, PrefillResult, Sequence
from services.wire.channel import TCP, Network, from_rpc_error, parsed
from services.wire.generated import worker_pb2, worker_pb2_grpc


class GrpcWorkerClient:
    """Implements WorkerClient. A broken session is replaced at the next use of its worker."""

    def __init__(self, network: Network = TCP) -> None:
        self._network = network
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._sessions: dict[WorkerKey, DecodeSession] = {}

    async def prefill(self, worker: WorkerReport, sequence: Sequence, *, expect_pull: bool) -> PrefillResult:
        stub = worker_pb2_grpc.PrefillStub(self._channel(worker))
        request = worker_pb2.PrefillRequest(
            sequence=sequence_to_wire(sequence), epoch=worker.epoch, expect_pull=expect_pull
        )
        try:
            result = prefill_from_wire(parsed(await stub.Run(request), worker.worker_id))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, worker.worker_id) from error
        except asyncio.CancelledError:
            # gRPC raises this also when the channel is closed under the call, which cancels nobody here.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerLost(f"{worker.worker_id}: the connection was given up") from None
        if found := nonsense(sequence, result):
            raise WorkerLost(f"{worker.worker_id} sent {found}")
        return result

    async def decode(
        self,
        worker: WorkerReport,
        sequence: Sequence,
        source: WorkerReport | None,
        deliver: Callable[[DecodeEvent], None],
    ) -> None:
        await self._session(worker).decode(sequence, source, deliver)

    def end_choice(self, worker: WorkerReport, sequence: Sequence, choice: int) -> None:
        if session := self._sessions.get(worker.key):
            session.end_choice(sequence, choice)

    async def keep_only(self, live: Collection[WorkerReport]) -> None:
        keys = {worker.key for worker in live}
        addresses = {worker.address for worker in live}
        for key in self._sessions.keys() - keys:
            await self._sessions.pop(key).close()
        for address in self._channels.keys() - addresses:
            await self._channels.pop(address).close()

    async def close(self) -> None:
        await self.keep_only([])

    def _channel(self, worker: WorkerReport) -> grpc.aio.Channel:
        if worker.address not in self._channels:
            self._channels[worker.address] = self._network.open_channel(worker.address)
        return self._channels[worker.address]

    def _session(self, worker: WorkerReport) -> DecodeSession:
        session = self._sessions.get(worker.key)
        if session is None or session.over:
            stub = worker_pb2_grpc.DecodeStub(self._channel(worker))
            session = self._sessions[worker.key] = DecodeSession(stub, worker)
        return session
