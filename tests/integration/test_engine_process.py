"""The real engine process behind its handle: it answers, and every way it can end is noticed."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal

import msgspec
import psutil
import pytest

from kernels.cpu.build import COMPILERS, processor_level
from services.core.clock import SystemClock
from services.core.errors import DiptychError, EngineFailed, EngineStalled, ModelFileError
from services.core.sampling import SamplingParams
from services.engine.handle import EngineHandle, Event, Stalled
from services.engine.messages import EngineSetup, Limits, Refused, Report, Submit, Token
from services.worker.config import WorkerConfig
from services.worker.identity import identify

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"


def setup(model: Path, quantization: Literal["none", "int8"] = "none") -> EngineSetup:
    config = WorkerConfig(
        model=str(model), redis="redis://unused", blocks=64, threads=1, quantization=quantization
    )
    identity = identify(config)
    return EngineSetup(
        model=str(model),
        device="cpu",
        threads=1,
        geometry=identity.geometry,
        compatibility=identity.compatibility,
        limits=Limits(sequences_max=8, waiting_max=8, chunk_tokens_max=64, step_ms_target=100.0),
    )


class Subject:
    def __init__(self, on_report: Callable[[Report], None] = lambda report: None) -> None:
        self.handle = EngineHandle(16, on_report, SystemClock())
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def submit(self, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.handle.submit(Submit("s", "local", PROMPT, [], params), self.events.put_nowait)

    async def next(self, kind: type[Event]) -> Event:
        while True:
            event = await asyncio.wait_for(self.events.get(), 30)
            if isinstance(event, kind):
                return event

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.handle._process.pid)


@pytest.fixture
async def subject(default_model: Path) -> AsyncIterator[Subject]:
    subject = Subject()
    await subject.handle.start(setup(default_model))
    yield subject
    await subject.handle.stop()


async def test_it_answers_with_tokens_in_order(subject: Subject) -> None:
    subject.submit(max_tokens=5)
    tokens = [await subject.next(Token) for _ in range(5)]
    assert [token.index for token in tokens] == [0, 1, 2, 3, 4]
    assert [token.finish for token in tokens] == [None, None, None, None, "length"]
    assert tokens[0].token == 7042, "Paris"


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")
async def test_with_8_bit_weights_it_answers_from_the_kernels(default_model: Path) -> None:
    subject = Subject()
    await subject.handle.start(setup(default_model, "int8"))
    loaded = [file.path for file in subject.process.memory_maps()]
    subject.submit(max_tokens=1)
    token = await subject.next(Token)
    await subject.handle.stop()
    assert token.token == 7042, "Paris"
    assert any(processor_level() in path and "kernels" in path for path in loaded)


async def test_without_a_compiler_8_bit_weights_are_refused_with_the_remedy(
    default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    subject = Subject()
    with pytest.raises(DiptychError, match=r"no-such-compiler.*--quantization none"):
        await subject.handle.start(setup(default_model, "int8"))


async def test_a_killed_engine_fails_every_sequence_once(subject: Subject) -> None:
    subject.submit(max_tokens=200)
    await subject.next(Token)
    subject.process.kill()
    refused = await subject.next(Refused)
    assert refused.code == "engine_failed"
    assert subject.handle.failed.is_set()
    await asyncio.sleep(0.05)
    assert subject.events.empty()
    with pytest.raises(EngineFailed):
        subject.submit(max_tokens=1)


class Watch:
    """What a watch with these limits tells."""

    def __init__(self, subject: Subject, overdue_s: float, hung_s: float) -> None:
        self.overdue: asyncio.Queue[bool] = asyncio.Queue()
        self.task = asyncio.create_task(subject.handle.watch(overdue_s, hung_s, self.overdue.put_nowait))

    async def told(self) -> bool:
        async with asyncio.timeout(30):
            return await self.overdue.get()


async def test_a_hung_engine_is_ended_and_noticed(subject: Subject) -> None:
    watch = Watch(subject, overdue_s=5.0, hung_s=0.5)
    subject.submit(max_tokens=200)
    for _ in range(3):
        await subject.next(Token)
    subject.process.send_signal(signal.SIGSTOP)
    assert (await subject.next(Refused)).code == "engine_failed"
    await watch.task


async def test_an_overdue_engine_loses_its_sequences_and_serves_again_when_it_goes_on(
    subject: Subject,
) -> None:
    watch = Watch(subject, overdue_s=1.0, hung_s=60.0)
    subject.submit(max_tokens=200)
    for _ in range(3):
        await subject.next(Token)
    subject.process.send_signal(signal.SIGSTOP)
    stalled = await subject.next(Stalled)
    assert isinstance(stalled.error, EngineStalled)
    subject.handle.drop("s")
    assert await watch.told()
    with pytest.raises(EngineStalled):
        subject.submit(max_tokens=1)
    subject.process.send_signal(signal.SIGCONT)
    assert not await watch.told()
    assert subject.events.empty(), "a dropped sequence said something"
    subject.submit(max_tokens=3)
    while (await subject.next(Token)).finish is None:
        pass
    gauges = subject.handle.gauges
    assert gauges.blocks_free + gauges.blocks_cached == gauges.blocks_total
    watch.task.cancel()


async def test_a_working_or_idle_engine_is_not_taken_for_overdue(subject: Subject) -> None:
    watch = Watch(subject, overdue_s=1.0, hung_s=1.5)
    await asyncio.sleep(2.0)
    subject.submit(max_tokens=100)
    while (await subject.next(Token)).finish is None:
        pass
    assert watch.overdue.empty()
    assert not watch.task.done()
    watch.task.cancel()


async def test_it_ends_with_the_process_that_started_it(subject: Subject) -> None:
    process = subject.process
    subject.handle._pipe.close()
    await asyncio.wait_for(subject.handle._process.wait(), 10)
    assert not process.is_running()


@pytest.fixture
def unusable(default_model: Path, tmp_path: Path) -> list[Path]:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(default_model.read_bytes()[:1_000_000])
    return [damaged, tmp_path / "missing.gguf"]


async def test_a_model_that_cannot_be_loaded_is_an_error_that_says_why(
    default_model: Path, unusable: list[Path]
) -> None:
    for path in unusable:
        with pytest.raises(ModelFileError, match=path.name):
            await Subject().handle.start(msgspec.structs.replace(setup(default_model), model=str(path)))
