"""A whole worker over in-memory surroundings: what the cluster and its gateways see of it in every state."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc.aio
import httpx
import msgspec
import pytest

from services.core.clock import SystemClock
from services.core.sampling import SamplingParams
from services.core.worker_report import WorkerKey, WorkerReport
from services.engine.messages import EngineSetup, Report
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from services.membership.protocol import LEASE_S
from services.wire.channel import open_channel
from services.wire.convert import sampling_to_wire
from services.wire.generated import worker_pb2, worker_pb2_grpc
from services.worker.config import WorkerConfig
from services.worker.identity import WorkerIdentity
from services.worker.main import Surroundings, Worker
from tests.support.in_process_engine import VOCAB, InProcessEngine, compatibility, geometry
from tests.unit.transfer.test_prefix_fetch import SlowToEnd

GRACE_S = 1.0
BLOCKS = 8_192
INDEX_BLOCKS_MAX = 20
ENDLESS = 10_000  # tokens of an answer that no test waits for


class JumpingClock(SystemClock):
    """Real time, in which the process can have stood still."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def now(self) -> float:
        return time.monotonic() + self._ahead_s

    def stand_still(self, seconds: float) -> None:
        self._ahead_s += seconds


class Engine(InProcessEngine):
    async def start(self, setup: EngineSetup) -> None:
        pass

    async def stop(self) -> None:
        pass


class Subject:
    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.clock = JumpingClock()
        self.membership = MemoryMembership(SystemClock())
        self.index = MemoryPrefixIndex(SystemClock())
        self.stop, self.at_once = asyncio.Event(), asyncio.Event()
        self.failures: asyncio.Queue[str] = asyncio.Queue()
        self.tokens = 0
        config = WorkerConfig(
            role="decode",
            transports="grpc",
            drain_grace_s=grace_s,
            drain_handover_s=GRACE_S / 2,
            step_overdue_s=0.2,
            index_blocks_max=INDEX_BLOCKS_MAX,
        )
        surroundings = Surroundings(
            self.index,
            self.membership,
            clock=self.clock,
            new_engine=self._new_engine,
            new_epoch=lambda: 2,
        )
        self.worker = Worker(config, self._identity(), surroundings)
        self.life = asyncio.create_task(self.worker.serve(self.stop, self.at_once))

    def _new_engine(self, sequences_max: int, on_report: Callable[[Report], None], clock: Any) -> Engine:
        self.engine = Engine(blocks=BLOCKS, on_report=on_report)
        return self.engine

    def _identity(self) -> WorkerIdentity:
        return WorkerIdentity(
            key=WorkerKey("w", 1),
            files=SimpleNamespace(path="", config=SimpleNamespace(vocab_size=VOCAB)),  # type: ignore[arg-type]
            served_model="m",
            geometry=geometry(BLOCKS),
            compatibility=compatibility(),
            context_tokens_max=2 * ENDLESS,
            threads=1,
        )

    async def report(self, what: Callable[[WorkerReport], bool] = lambda report: True) -> WorkerReport:
        """The worker's report in membership, once it says so."""
        async with asyncio.timeout(5):
            while True:
                for report in await self.membership.workers():
                    if report.worker_id == "w" and what(report):
                        return report
                await asyncio.sleep(0.005)

    async def health(self, path: str) -> int:
        url = (await self.report()).metrics_url.replace("/metrics", path)
        async with httpx.AsyncClient() as http:
            return (await http.get(url)).status_code

    def metric(self, name: str, **labels: str) -> float:
        return self.worker._metrics.registry.get_sample_value(f"diptych_worker_{name}", labels) or 0.0

    async def open_session(self) -> None:
        self.channel = open_channel((await self.report()).address)
        self.session = worker_pb2_grpc.DecodeStub(self.channel).Session()
        self.reading = asyncio.create_task(self._read())

    async def submit(self, name: str, max_tokens: int = ENDLESS, epoch: int = 1) -> None:
        sequence = worker_pb2.Sequence(
            request_id=name,
            prompt_ids=range(1, 12),
            sampling=sampling_to_wire(SamplingParams(max_tokens=max_tokens)),
        )
        submit = worker_pb2.DecodeSubmit(sequence=sequence, epoch=epoch)
        await self.session.write(worker_pb2.DecodeCommand(submit=submit))

    async def running(self) -> None:
        """Wait until a sequence has given tokens."""
        async with asyncio.timeout(5):
            while not self.tokens:
                await asyncio.sleep(0.005)

    async def failure(self) -> str:
        async with asyncio.timeout(5):
            return await self.failures.get()

    async def announce_another(self) -> None:
        other = msgspec.structs.replace(await self.report(), worker_id="other", state="ready")
        await self.membership.announce(other)

    async def close(self) -> None:
        self.stop.set()
        self.at_once.set()
        async with asyncio.timeout(10):
            await self.life
        self.reading.cancel()
        await self.channel.close()
        self.engine.resume()

    async def _read(self) -> None:
        try:
            async for events in self.session:
                for event in events.events:
                    self.tokens += event.HasField("token")
                    if event.HasField("failure"):
                        self.failures.put_nowait(event.failure.code)
        except grpc.aio.AioRpcError as error:
            self.failures.put_nowait(error.code().name)


@pytest.fixture
async def subject() -> AsyncIterator[Subject]:
    subject = Subject()
    await subject.open_session()
    yield subject
    await subject.close()


def ready(report: WorkerReport) -> bool:
    return report.state == "ready"


async def test_an_overdue_engine_makes_the_worker_unready_until_it_is_back(subject: Subject) -> None:
    await subject.submit("r")
    await subject.running()
    assert await subject.health("/health/ready") == 200
    subject.engine.paused = True
    assert await subject.failure() == "engine_stalled"
    await subject.report(lambda report: report.state == "stalled")
    assert await subject.health("/health/ready") == 503
    assert await subject.health("/health/live") == 200
    assert subject.metric("state", state="stalled") == 1
    subject.engine.resume()
    report = await subject.report(ready)
    assert report.epoch == 1
    assert await subject.health("/health/ready") == 200
    assert subject.metric("engine_overdue_total") == 1
    assert subject.metric("state", state="ready") == 1


async def test_a_worker_that_stood_still_is_another_incarnation_and_holds_nothing(subject: Subject) -> None:
    await subject.submit("old")
    await subject.running()
    subject.clock.stand_still(LEASE_S + 0.5)
    await subject.submit("late")  # it may be handled before the worker has noticed
    assert {await subject.failure(), await subject.failure()} == {"worker_lost"}
    report = await subject.report(lambda report: report.epoch == 2)
    assert report.state == "ready"
    await subject.engine.idle.wait()
    assert subject.metric("epochs_total") == 1
    await subject.submit("new", epoch=2, max_tokens=3)
    subject.tokens = 0
    await subject.running()


async def test_a_cancelled_prefill_gives_no_block_up_while_its_fetch_may_still_write(
    subject: Subject,
) -> None:
    transport = SlowToEnd()
    subject.worker._incarnation.role = "both"
    subject.worker._server._fetcher._transport = transport
    source = worker_pb2.KvSource(worker_id="s", address="127.0.0.1:1", epoch=7)
    request = worker_pb2.PrefillRequest(
        sequence=worker_pb2.Sequence(
            request_id="r",
            prompt_ids=range(1, 18),
            sampling=sampling_to_wire(SamplingParams(max_tokens=2)),
            prefix=worker_pb2.PrefixSource(worker=source, tokens=16),
        ),
        epoch=1,
    )
    call = worker_pb2_grpc.PrefillStub(subject.channel).Run(request)
    async with asyncio.timeout(5):
        while not transport.lends:
            await asyncio.sleep(0.005)
        call.cancel()
        while subject.worker._server.leases.open_leases:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert subject.engine.sequences == 1, "the blocks may be reused under the fetch"
        transport.written.set()
        await subject.engine.idle.wait()


async def test_the_index_is_told_of_as_many_blocks_as_configured(subject: Subject) -> None:
    await subject.submit("long")
    async with asyncio.timeout(10):
        while subject.tokens < 8 * INDEX_BLOCKS_MAX or not subject.index.blocks:  # twice as many, of 4 tokens
            await asyncio.sleep(0.01)
    assert subject.index.blocks == INDEX_BLOCKS_MAX


async def test_an_absent_membership_ends_no_incarnation(subject: Subject) -> None:
    subject.membership.available = False
    await asyncio.sleep(LEASE_S + 0.5)
    subject.membership.lose_everything()
    subject.membership.available = True
    assert (await subject.report()).epoch == 1
    assert subject.metric("epochs_total") == 0


async def test_a_draining_worker_refuses_new_work_and_finishes_what_runs() -> None:
    subject = Subject(grace_s=30.0)
    await subject.open_session()
    await subject.submit("running", max_tokens=500)
    await subject.running()
    subject.stop.set()
    await subject.report(lambda report: report.state == "draining")
    assert await subject.health("/health/ready") == 503
    await subject.submit("new")
    assert await subject.failure() == "draining"
    await subject.life
    await subject.reading
    assert subject.tokens == 500
    assert subject.metric("handovers_total") == 0
    assert await subject.membership.workers() == []
    await subject.close()


async def test_what_would_not_finish_is_handed_over_before_the_grace_ends(subject: Subject) -> None:
    await subject.submit("long")
    await subject.running()
    await subject.announce_another()
    started_s = time.monotonic()
    subject.stop.set()
    assert await subject.failure() == "draining"
    assert GRACE_S / 2 <= time.monotonic() - started_s < GRACE_S
    await subject.life
    assert subject.metric("handovers_total") == 1


async def test_without_another_worker_sequences_run_until_the_grace_ends(subject: Subject) -> None:
    await subject.submit("long")
    await subject.running()
    started_s = time.monotonic()
    subject.stop.set()
    assert await subject.failure() == "draining"
    assert time.monotonic() - started_s >= GRACE_S
    await subject.life


async def test_a_second_signal_ends_the_drain_at_once(subject: Subject) -> None:
    await subject.submit("long")
    await subject.running()
    subject.stop.set()
    await subject.report(lambda report: report.state == "draining")
    subject.at_once.set()
    started_s = time.monotonic()
    assert await subject.failure() == "draining"
    await subject.life
    assert time.monotonic() - started_s < GRACE_S / 2


async def test_a_worker_whose_engine_is_no_longer_watched_ends_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = Subject()
    await subject.report()

    def broken() -> None:
        raise RuntimeError("a listener's bug")

    monkeypatch.setattr(subject.worker._announcer, "changed", broken)
    subject.engine.paused = True
    async with asyncio.timeout(5):
        with pytest.raises(RuntimeError, match="a listener's bug"):
            await subject.life
