"""Whatever workers answer, every request ends once with a well-formed answer, and the gateway goes on."""

import asyncio
import gc
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from random import Random
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from services.core.clock import SystemClock
from services.gateway.api.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.served_model import ServedModel
from services.gateway.workers.grpc_worker_client import GrpcWorkerClient
from services.history.memory_history import MemoryHistory
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from services.wire.channel import listen, new_server
from services.wire.generated import worker_pb2
from tests.fuzz.messages import Known, random_bytes, random_message
from tests.support.completions import MODEL
from tests.unit.gateway.in_memory_cluster import in_process
from tests.unit.gateway.scripted_worker_server import report

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 40) // 6
AT_ONCE = 8
LENGTH = 5
NEVER = 2**31  # a token beyond every vocabulary


class Nonsense:
    """Both parts of a worker. It answers with messages that fit the request more or less, unless it is
    `honest`; then it says the token 100 + index until the end."""

    def __init__(self) -> None:
        self.random = Random(0)
        self.honest = False

    async def Run(self, request: Any, context: Any) -> Any:
        if self.honest:
            return worker_pb2.PrefillReply(firsts=_tokens(request.sequence, 0)).SerializeToString()
        known = _known(request.sequence)
        if self.random.random() < 0.05:
            return random_bytes(worker_pb2.PrefillReply, self.random, known)
        return random_message(worker_pb2.PrefillReply, self.random, known).SerializeToString()

    async def Session(self, commands: Any, context: Any) -> AsyncIterator[bytes]:
        async for command in commands:
            if not command.HasField("submit"):
                continue
            sequence = command.submit.sequence
            for message in self._events(sequence, 1 if command.submit.HasField("source") else 0):
                yield message
            if not self.honest and self.random.random() < 0.1:
                return

    def _events(self, sequence: Any, begun: int) -> Sequence[bytes]:
        if self.honest:
            return [
                _event(sequence, token=token).SerializeToString()
                for index in range(begun, LENGTH)
                for token in _tokens(sequence, index)
            ]
        messages = [self._message(sequence) for _ in range(self.random.choice([0, 1, 3, 20]))]
        lost = worker_pb2.WorkerFailure(
            code=self.random.choice(["worker_lost", "", "draining", "nobody knows"])
        )
        return [*messages, _event(sequence, failure=lost).SerializeToString()]

    def _message(self, sequence: Any) -> bytes:
        if self.random.random() < 0.02:
            return random_bytes(worker_pb2.DecodeEvents, self.random, _known(sequence))
        return random_message(worker_pb2.DecodeEvents, self.random, _known(sequence)).SerializeToString()


def _tokens(sequence: Any, index: int) -> list[worker_pb2.SampledToken]:
    finish = worker_pb2.FINISH_REASON_LENGTH if index + 1 == LENGTH else worker_pb2.FINISH_REASON_UNSPECIFIED
    return [
        worker_pb2.SampledToken(index=index, token=100 + index, finish=finish, choice=choice)
        for choice in list(sequence.choice_ids) or [0]
    ]


def _event(sequence: Any, **event: Any) -> worker_pb2.DecodeEvents:
    one = worker_pb2.DecodeEvent(request_id=sequence.request_id, attempt=sequence.attempt, **event)
    return worker_pb2.DecodeEvents(events=[one])


def _known(sequence: Any) -> Known:
    begun = len(sequence.output_ids)
    return {
        "request_id": [sequence.request_id],
        "attempt": [sequence.attempt],
        "index": [*range(begun, LENGTH), begun, begun],
        "token": [100, 200, 300],
        "choice": list(sequence.choice_ids) or [0],
        "finish": [0, 0, 0, 1, 2],
        "firsts": [_tokens(sequence, begun)],
        "code": ["worker_lost", "kv_source_lost", "overloaded"],
        "cached_tokens": [0, 1],
        "fetched_tokens": [0, 1],
        "logprob": [-1.0],
        "rank": [1],
        "top_ids": [1, 2],
        "top_logprobs": [-1.0],
        **{name: [0.0, 5.0] for name in ("queue_ms", "compute_ms", "fetch_ms", "transfer_ms", "exposed_ms")},
    }


def _serve(worker: Nonsense, server: grpc.aio.Server) -> None:
    """As generated code does it, but for the answers, which may be bytes that are no messages."""
    run = grpc.unary_unary_rpc_method_handler(worker.Run, worker_pb2.PrefillRequest.FromString, bytes)
    session = grpc.stream_stream_rpc_method_handler(
        worker.Session, worker_pb2.DecodeCommand.FromString, bytes
    )
    for service, handlers in (("Prefill", {"Run": run}), ("Decode", {"Session": session})):
        handler = grpc.method_handlers_generic_handler(f"diptych.v1.{service}", handlers)
        server.add_generic_rpc_handlers((handler,))


@pytest.fixture
async def worker() -> AsyncIterator[Nonsense]:
    worker = Nonsense()
    server = new_server()
    _serve(worker, server)
    worker.address = f"127.0.0.1:{listen(server, '127.0.0.1', 0)}"  # type: ignore[attr-defined]
    await server.start()
    yield worker
    await server.stop(0)


@pytest.fixture
async def gateway(model: ServedModel, worker: Nonsense) -> AsyncIterator[Gateway]:
    clock = SystemClock()
    membership = MemoryMembership(clock, ttl_s=3600)
    address = worker.address  # type: ignore[attr-defined]
    for name, role in (("p1", "prefill"), ("p2", "prefill"), ("d1", "decode"), ("d2", "decode")):
        await membership.announce(report(name, role, address=address))
    config = GatewayConfig(seed=1, request_timeout_s=2.0, admission_timeout_s=0.05, attempts_max=3)
    client = GrpcWorkerClient()
    index, history = MemoryPrefixIndex(clock, ttl_s=3600), MemoryHistory(clock, ttl_s=3600)
    gateway = Gateway(config, model, membership, index, client, history, clock)
    await gateway.view.refresh()
    yield gateway
    await client.close()


def body(random: Random) -> dict[str, Any]:
    """A completion that asks for this and that."""
    asked: dict[str, Any] = {"model": MODEL, "prompt": [1, 2, 3, 4], "max_tokens": LENGTH, "ignore_eos": True}
    asked["n"] = random.choice([1, 1, 3])
    asked["stream"] = random.random() < 0.4
    if random.random() < 0.5:
        asked["logprobs"] = random.choice([0, 2])
        asked["echo"] = random.random() < 0.5
    if random.random() < 0.3:
        asked["stop"] = ["x"]
    return asked


async def ends_well_formed(http: httpx.AsyncClient, asked: dict[str, Any]) -> None:
    response = await http.post("/v1/completions", json=asked)
    assert response.status_code != 500, response.text
    if asked["stream"] and response.status_code == 200:
        *events, last = [line for line in response.text.splitlines() if line.startswith("data: ")]
        chunks = [strict(line.removeprefix("data: ")) for line in events]
        assert last == "data: [DONE]" or "error" in strict(last.removeprefix("data: "))
        choices = [choice for chunk in chunks for choice in chunk.get("choices", [])]
        finishes = [choice["index"] for choice in choices if choice["finish_reason"]]
        assert len(finishes) == len(set(finishes)), "a choice ended twice"
    else:
        answer = strict(response.text)
        assert ("error" in answer) == (response.status_code != 200)
        if response.status_code == 200:
            assert [choice["index"] for choice in answer["choices"]] == list(range(asked["n"]))
            assert 0 < answer["usage"]["completion_tokens"] <= LENGTH * asked["n"]


def strict(text: str) -> Any:
    """JSON without NaN and infinities, which Python's own reader would take."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} in {text}")

    return json.loads(text, parse_constant=refuse)


async def test_requests_end_well_formed_whatever_workers_answer(
    gateway: Gateway, worker: Nonsense, caplog: pytest.LogCaptureFixture
) -> None:
    async with in_process(build_app(gateway)) as http:
        for seed in range(EXAMPLES):
            worker.random, random = Random(seed), Random(-seed)
            await asyncio.gather(*(ends_well_formed(http, body(random)) for _ in range(AT_ONCE)))
            gc.collect()  # so that tasks which nobody asked tell what ended them
            ours = [record for record in caplog.records if not record.name.startswith("grpc")]
            assert not [r for r in ours if r.levelno >= logging.ERROR], f"seed {seed}: {caplog.text}"
        worker.honest = True
        for name, role in (("p3", "prefill"), ("d3", "decode")):  # the others are avoided for a while
            await gateway.view._membership.announce(report(name, role, address=worker.address))
        await gateway.view.refresh()
        ordinary = body(Random(1)) | {"n": 1, "stream": False}
        async with asyncio.timeout(10):  # a worker that failed is avoided for a while
            while (answer := await http.post("/v1/completions", json=ordinary)).status_code != 200:
                await asyncio.sleep(0.1)
        assert answer.json()["usage"]["completion_tokens"] == LENGTH
