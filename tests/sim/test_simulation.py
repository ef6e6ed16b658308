"""Simulated clusters hold what they promise; the simulator repeats itself, and finds what is broken."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import google_crc32c
import pytest

from services.engine.engine import Engine
from services.engine.messages import Command, Drop, EngineSetup
from services.wire.generated import transfer_pb2
from tests.sim.call import SimCall
from tests.sim.engine import TimedRunner
from tests.sim.loop import Process, Stuck, VirtualLoop
from tests.sim.simulation import simulate

SEEDS = 200
FAULTS = [
    *("kill", "engine_kill", "gateway_kill", "stall", "engine_stall", "gateway_stall", "drain", "role"),
    *("cut_gateway", "cut_workers", "silence", "delay", "flip", "lease_expiry", "reuse"),
    *("store_away", "store_lost", "store_cut", "client_leaves"),
]


def python_m_sim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.sim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_clusters_survive_whatever_happens_to_them() -> None:
    done = python_m_sim("--seeds", str(SEEDS), "--processes", "2")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for fault in FAULTS:
        assert f" {fault}" in done.stdout, f"no seed brought about {fault}"


def test_a_seed_repeats_every_step_and_another_one_does_not() -> None:
    first, again, other = (python_m_sim("--seed", seed).stdout for seed in ("11", "11", "12"))
    assert first == again
    assert first.splitlines()[-1].split("trace")[1] != other.splitlines()[-1].split("trace")[1]


class LeakyEngine(Engine):
    def handle(self, command: Command) -> None:
        if isinstance(command, Drop) and self._pool.can_allocate(1):
            self._pool.allocate(1)  # which nobody will ever free
        super().handle(command)


def leaky(setup: EngineSetup, pool: memoryview, clock: Any, pace: Any) -> Engine:
    runner = TimedRunner(setup, pool, clock, pace)
    return LeakyEngine(runner, setup.compatibility, setup.geometry.blocks, setup.limits, clock)


def without_generations(setup: EngineSetup, pool: memoryview, clock: Any, pace: Any) -> Engine:
    runner = TimedRunner(setup, pool, clock, pace)
    return Engine(runner, setup.compatibility, setup.geometry.blocks, setup.limits, clock)


def lost_events() -> Callable[[SimCall, bytes], bytes | None]:
    sent = 0

    def tamper(call: SimCall, reply: bytes) -> bytes | None:
        nonlocal sent
        sent += call.name == "Session"
        return None if call.name == "Session" and sent % 50 == 0 else reply

    return tamper


def wrong_kv_with_a_right_checksum(call: SimCall, reply: bytes) -> bytes:
    if call.name != "Pull":
        return reply
    message = transfer_pb2.KvMessage.FromString(reply)
    chunk = message.chunk
    if chunk.payload:
        chunk.payload = bytes([chunk.payload[0] ^ 1]) + chunk.payload[1:]
        chunk.crc32c = google_crc32c.value(chunk.payload)
    return message.SerializeToString()


def confirmed_without_a_look(call: SimCall, reply: bytes) -> bytes:
    valid = transfer_pb2.ReleaseReply(valid=True)
    return valid.SerializeToString() if call.name == "Release" else reply


def finds(what: str, **broken: Any) -> bool:
    """Whether the simulator complains of `what` in a broken cluster."""
    return any(what in complaint for seed in range(60) for complaint in simulate(seed, **broken).complaints)


def tampering(tamper: Any) -> dict[str, Any]:
    return {"sabotage": lambda run: setattr(run.world.network, "tamper", tamper)}


def test_an_engine_that_leaks_a_block_is_found() -> None:
    assert finds("owners", build_engine=leaky)


def test_a_lost_event_is_found() -> None:
    assert finds("deadline", **tampering(lost_events()))


def test_wrong_kv_is_found() -> None:
    assert finds("instead of", **tampering(wrong_kv_with_a_right_checksum))


def test_a_confirmation_that_does_not_look_is_found() -> None:
    """Generations find reuse too, so both guards are off."""
    broken = tampering(confirmed_without_a_look)
    assert finds("instead of", build_engine=without_generations, **broken)


class TestTheLoop:
    def run(self, work: Any, seed: int = 1) -> Any:
        loop = VirtualLoop(seed)
        try:
            return loop.run_until_complete(work(loop))
        finally:
            loop.close()

    def test_sleeping_takes_no_time(self) -> None:
        async def work(loop: VirtualLoop) -> float:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(7200):
                    await asyncio.sleep(10_000)
            return loop.time()

        assert self.run(work) == 7200

    def test_the_seed_decides_who_goes_first(self) -> None:
        async def work(loop: VirtualLoop) -> list[int]:
            order: list[int] = []

            async def one(number: int) -> None:
                order.append(number)

            await asyncio.gather(*map(one, range(10)))
            return order

        assert self.run(work, 1) == self.run(work, 1)
        assert self.run(work, 1) != self.run(work, 2)

    def test_a_stopped_process_goes_on_where_it_was(self) -> None:
        async def work(loop: VirtualLoop) -> float:
            process = Process(loop, "worker")

            async def woken() -> float:
                await asyncio.sleep(1.0)
                return loop.time()

            task = process.start(woken())
            await asyncio.sleep(0.5)
            process.stop()
            await asyncio.sleep(5.0)
            assert not task.done()
            process.resume()
            return await task

        assert self.run(work) == 5.5

    def test_what_can_never_end_is_noticed(self) -> None:
        async def work(loop: VirtualLoop) -> None:
            await loop.create_future()

        async def busy(loop: VirtualLoop) -> None:
            while True:
                await asyncio.sleep(0)

        for endless in (work, busy):
            with pytest.raises(Stuck):
                self.run(endless)
