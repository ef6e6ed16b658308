"""The two worker services over gRPC, answered by a MemoryWorkerClient: the far end for client tests."""

import asyncio

from services.core.block_hash import Compatibility
from services.core.errors import DiptychError, facts
from services.core.worker_report import WorkerReport
from services.gateway.workers.memory_worker_client import MemoryWorkerClient
from services.gateway.workers.worker_client import Sequence, Started
from services.wire.channel import abort, new_server
from services.wire.convert import choices_from_wire, sampled_to_wire, sampling_from_wire
from services.wire.generated import worker_pb2, worker_pb2_grpc


def report(worker_id: str, role: str, *, address: str = "memory", epoch: int = 1, **changes) -> WorkerReport:
    values = {
        "state": "ready",
        "served_model": "SmolLM2-135M-Instruct",
        "compatibility": Compatibility(model="m", revision="r", layout="l"),
        "context_tokens_max": 2048,
        "blocks_total": 512,
        "blocks_free": 512,
    }
    return WorkerReport(worker_id=worker_id, epoch=epoch, role=role, address=address, **{**values, **changes})


def sequence_from_wire(wire: worker_pb2.Sequence) -> Sequence:
    return Sequence(
        request_id=wire.request_id,
        attempt=wire.attempt,
        prompt_ids=list(wire.prompt_ids),
        output_ids=list(wire.output_ids),
        sampling=sampling_from_wire(wire.sampling),
        salt=wire.salt,
        choices=choices_from_wire(wire),
    )


def token_to_wire(token) -> worker_pb2.SampledToken:
    return sampled_to_wire(token.index, token.token, token.finish, token.choice)


class ScriptedWorkerServer(worker_pb2_grpc.PrefillServicer, worker_pb2_grpc.DecodeServicer):
    """Serves every worker id that its caller gives to `worker`, all at one address."""

    def __init__(self, memory: MemoryWorkerClient) -> None:
        self._memory = memory
        self._server = new_server()
        self.sessions_opened = 0
        worker_pb2_grpc.add_PrefillServicer_to_server(self, self._server)
        worker_pb2_grpc.add_DecodeServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    async def Run(self, request, context):
        worker = report("w", "both", epoch=request.epoch)
        try:
            result = await self._memory.prefill(
                worker, sequence_from_wire(request.sequence), expect_pull=request.expect_pull
            )
        except DiptychError as error:
            await abort(context, error)
        firsts = map(token_to_wire, result.firsts)
        return worker_pb2.PrefillReply(firsts=firsts, cached_tokens=result.cached_tokens)

    async def Session(self, request_iterator, context):
        self.sessions_opened += 1
        outbox: asyncio.Queue[worker_pb2.DecodeEvents] = asyncio.Queue()
        obeying = asyncio.create_task(self._obey(request_iterator, outbox))
        try:
            while True:
                yield await outbox.get()
        finally:
            obeying.cancel()
            await asyncio.wait([obeying])

    async def _obey(self, commands, outbox) -> None:
        running: dict[tuple[str, int], asyncio.Task] = {}
        try:
            async for command in commands:
                if command.HasField("submit"):
                    sequence = command.submit.sequence
                    task = asyncio.create_task(self._decode(command.submit, outbox))
                    running[sequence.request_id, sequence.attempt] = task
                else:
                    self._cancel(command.cancel, running)
        finally:
            for task in running.values():
                task.cancel()

    def _cancel(self, cancel, running) -> None:
        if not cancel.choice_ids:
            running[cancel.request_id, cancel.attempt].cancel()
        for call in self._memory.running:
            if (call.sequence.request_id, call.sequence.attempt) == (cancel.request_id, cancel.attempt):
                for choice in cancel.choice_ids:
                    self._memory.end_choice(
                        report("w", "both", epoch=call.worker.epoch), call.sequence, choice
                    )

    async def _decode(self, submit, outbox) -> None:
        sequence = sequence_from_wire(submit.sequence)
        source = None
        if submit.HasField("source"):
            source = report(submit.source.worker_id, "prefill", epoch=submit.source.epoch)

        def send(**event) -> None:
            wire = worker_pb2.DecodeEvent(request_id=sequence.request_id, attempt=sequence.attempt, **event)
            outbox.put_nowait(worker_pb2.DecodeEvents(events=[wire]))

        def deliver(event) -> None:
            if isinstance(event, Started):
                send(started=worker_pb2.DecodeStarted(cached_tokens=event.cached_tokens))
            else:
                send(token=token_to_wire(event))

        worker = report("w", "both", epoch=submit.epoch)
        try:
            await self._memory.decode(worker, sequence, source, deliver)
        except DiptychError as error:
            send(failure=worker_pb2.WorkerFailure(code=facts(error).label, message=error.message))
