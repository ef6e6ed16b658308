"""Whatever arrives at a worker's port, it goes on serving, and nothing of it is left.

Messages of every RPC with anything in their fields, and bytes that are none, over real gRPC at a worker with
its real services and engine (its model is arithmetic). `make fuzz EXAMPLES=2000` sends more of them.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from random import Random
from typing import NamedTuple

import grpc.aio
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from services.core.sampling import SamplingParams
from services.core.worker_report import WorkerKey
from services.wire.channel import TCP, open_channel
from services.wire.convert import compatibility_to_wire, sampling_to_wire
from services.wire.generated import transfer_pb2, worker_pb2, worker_pb2_grpc
from tests.fuzz.messages import Known, random_bytes
from tests.support.in_process_cluster import InProcessWorker, Waits
from tests.support.in_process_engine import compatibility

EPOCH = 7
EXAMPLES_CI = 40
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or EXAMPLES_CI)
CALLS_AT_ONCE = 16
PATIENCE_S = 0.15  # then a call is cancelled, if it has not ended by itself


class Method(NamedTuple):
    path: str
    request: type[Message]
    streams: bool = False


METHODS = [
    Method("/diptych.v1.Prefill/Run", worker_pb2.PrefillRequest),
    Method("/diptych.v1.Decode/Session", worker_pb2.DecodeCommand, streams=True),
    Method("/diptych.v1.KvTransfer/Pull", transfer_pb2.PullRequest),
    Method("/diptych.v1.KvTransfer/Lend", transfer_pb2.LendRequest),
    Method("/diptych.v1.KvTransfer/Release", transfer_pb2.ReleaseRequest),
    Method("/diptych.v1.Control/SetRole", worker_pb2.SetRoleRequest),
]


class Call(NamedTuple):
    method: Method
    requests: Sequence[bytes]


class Subject:
    """A worker that does both parts, and a channel to it, in an event loop of its own."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.runner.run(self._start())

    async def _start(self) -> None:
        waits = Waits(pull_wait_s=0.05, lease_ttl_s=0.1)
        self.worker = InProcessWorker("both", WorkerKey("w", EPOCH), 0, TCP, 64, waits)
        await self.worker.start()
        self.address = self.worker.server.address
        self.channel = open_channel(self.address)
        self.asked = 0
        self.expected = await self.ask()

    async def stop(self) -> None:
        await self.channel.close()
        await self.worker.die()

    def survives(self, calls: Sequence[Call]) -> None:
        self.runner.run(self._survives(calls))

    async def _survives(self, calls: Sequence[Call]) -> None:
        await asyncio.gather(*map(self._send, calls))
        async with asyncio.timeout(5):
            while self.worker.held:
                await asyncio.sleep(0.002)
        self.worker.engine.engine.check_integrity()
        self.worker.server._incarnation.role = "both"  # SetRole may have changed it, as it should
        assert await self.ask() == self.expected

    async def _send(self, call: Call) -> None:
        """What it says is its own affair; that it ends is not."""
        with suppress(grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError):
            async with asyncio.timeout(PATIENCE_S):
                if call.method.streams:
                    stream = self.channel.stream_stream(call.method.path)()
                    for request in call.requests:
                        await stream.write(request)
                else:
                    stream = self.channel.unary_stream(call.method.path)(call.requests[0])
                async for _ in stream:
                    pass

    async def ask(self) -> list[int]:
        """The answer of an ordinary sequence."""
        self.asked += 1
        sequence = worker_pb2.Sequence(
            request_id=f"ordinary-{self.asked}",
            prompt_ids=[3, 1, 4, 1, 5, 9, 2, 6, 5],
            sampling=sampling_to_wire(SamplingParams(max_tokens=6, temperature=0)),
        )
        submit = worker_pb2.DecodeSubmit(sequence=sequence, epoch=EPOCH)
        call = worker_pb2_grpc.DecodeStub(self.channel).Session()
        await call.write(worker_pb2.DecodeCommand(submit=submit))
        tokens: list[int] = []
        async with asyncio.timeout(5):
            async for batch in call:
                for event in batch.events:
                    assert not event.HasField("failure"), event.failure
                    tokens += [event.token.token] if event.HasField("token") else []
                    if event.token.finish:
                        call.cancel()
                        return tokens
        raise AssertionError("the session ended early")


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    subject = Subject()
    yield subject
    subject.runner.run(subject.stop())
    subject.runner.close()


def known(address: str) -> Known:
    """Values with which a message means something here."""
    return {
        "epoch": [EPOCH],
        "compatibility": [compatibility_to_wire(compatibility())],
        "address": [address, address, "127.0.0.1:1"],
        "worker_id": ["w"],
        "request_id": ["r", "s"],
        "transfer_id": ["r/0", "s/0", "r/1", "s/1", "r/0/prefix", "s/1/prefix"],
        "attempt": [0, 1],
        "max_tokens": [12, 20, 40],
        "min_tokens": [0, 3],
        "top_k": [0, 1, 5],
        "prompt_ids": [1, 2, 3],
        "output_ids": [1, 2, 3],
        "token_ids": [1, 2, 3],
        "choice_ids": list(range(5000)),
        "allowed_token_ids": [1, 2, 3],
        "end_token_ids": [4, 5],
        "tokens": [4, 8, 12],
        "temperature": [0.0, 1.0],
        "top_p": [1.0, 0.5],
        "min_p": [0.0, 0.5],
        "presence_penalty": [0.0, 1.0],
        "frequency_penalty": [0.0],
        "repetition_penalty": [1.0, 1.2],
        "grammar": ["", "", 'start: "a"', "start: nobody", "{"],
        "top_logprobs": [0, 2],
        "prompt_logprobs": [0, 2],
        "logit_bias": [1.0],
        "role": ["both"] * 9 + ["prefill"],
        "salt": ["", "a"],
        "transports": ["grpc", "nixl"],
        "first_token": [0, 4, 8],
        "ids": [1, 2],
        "value": [0.5],
        "key": [1, 2],
        "expect_pull": [True, False, False],
        "seed": [1, 2],
    }


def call_of(method: Method, seed: int, values: Known) -> Call:
    random = Random(seed)
    requests = random.choice([1, 2, 5, 20]) if method.streams else 1
    return Call(method, [random_bytes(method.request, random, values) for _ in range(requests)])


def test_it_goes_on_serving_and_nothing_is_left(subject: Subject) -> None:
    values = known(subject.address)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=EXAMPLES == EXAMPLES_CI,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.lists(st.tuples(st.sampled_from(METHODS), st.integers(0, 2**32)), max_size=CALLS_AT_ONCE))
    def survives(drawn: list[tuple[Method, int]]) -> None:
        subject.survives([call_of(method, seed, values) for method, seed in drawn])

    survives()
