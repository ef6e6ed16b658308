"""A worker that does both parts keeps them apart."""

import grpc.aio
import pytest

from services.core.sampling import SamplingParams
from services.core.worker_report import WorkerKey
from services.wire.channel import TCP, open_channel
from services.wire.convert import sampling_to_wire
from services.wire.generated import worker_pb2, worker_pb2_grpc
from tests.support.in_process_cluster import InProcessWorker, Waits, until


async def test_a_prefill_of_an_attempt_that_is_decoded_here_does_not_end_it() -> None:
    worker = InProcessWorker("both", WorkerKey("w", 7), 0, TCP, 64, Waits(0.1, 0.1))
    await worker.start()
    sequence = worker_pb2.Sequence(
        request_id="r", prompt_ids=[1, 2, 3], sampling=sampling_to_wire(SamplingParams(max_tokens=4))
    )
    async with open_channel(worker.server.address) as channel:
        worker.engine.paused = True
        call = worker_pb2_grpc.DecodeStub(channel).Session()
        submit = worker_pb2.DecodeSubmit(sequence=sequence, epoch=7)
        await call.write(worker_pb2.DecodeCommand(submit=submit))
        await until(lambda: worker.engine.sequences)
        with pytest.raises(grpc.aio.AioRpcError, match="running already"):
            await worker_pb2_grpc.PrefillStub(channel).Run(
                worker_pb2.PrefillRequest(sequence=sequence, epoch=7)
            )
        worker.engine.resume()
        tokens = 0
        while tokens < 4:
            batch = await call.read()
            tokens += sum(event.HasField("token") for event in batch.events)
        call.cancel()
    await worker.die()
