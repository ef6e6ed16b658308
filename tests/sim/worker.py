"""A simulated worker: the production Worker in a process of its own, restarted whenever it ends."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from services.core.block_hash import Compatibility
from services.core.clock import Clock
from services.core.errors import EngineFailed
from services.core.worker_report import WorkerKey
from services.model.pool_geometry import PoolGeometry
from services.transfer import server as kv_server
from services.worker.config import WorkerConfig
from services.worker.identity import WorkerIdentity
from services.worker.main import Surroundings, Worker
from tests.sim.engine import VOCAB, Pace, SimEngine
from tests.sim.loop import Process, VirtualLoop
from tests.sim.network import SimNetwork
from tests.sim.one_sided import SharedMemory
from tests.sim.store import SimStore, StoreClient
from tests.sim.trace import Trace

MODEL = "arithmetic"
_LAST_TASKS_S = 1.0  # for the tasks of a process that has ended


@contextmanager
def toy_messages() -> Iterator[None]:
    """Toy blocks are some 100 bytes, those of a real model up to several MB, with one block in a message.
    The sizes are module constants, and other tests in this process want the real ones."""
    real = kv_server.CHUNK_BYTES, kv_server.REFERENCE_BYTES
    kv_server.CHUNK_BYTES, kv_server.REFERENCE_BYTES = 64, 128
    try:
        yield
    finally:
        kv_server.CHUNK_BYTES, kv_server.REFERENCE_BYTES = real


@dataclass(frozen=True, slots=True)
class World:
    """What all simulated processes stand in."""

    loop: VirtualLoop
    clock: Clock
    rng: random.Random
    trace: Trace
    network: SimNetwork
    store: SimStore
    shared: SharedMemory
    on_bug: Callable[[str], None]
    pace: Pace
    events: Counter[str] = field(default_factory=Counter)
    build_engine: Any = None  # replaces the engine, to prove that a broken one is found


class SimWorker:
    def __init__(self, world: World, config: WorkerConfig) -> None:
        self._world = world
        self.config = config
        self.name = config.worker_id
        self.starts = 0
        self._wanted = True  # restarted when it ends
        self.start()

    def start(self) -> None:
        world, name = self._world, self.name
        self.starts += 1
        self.io = Process(world.loop, name)
        self.engine_process = Process(world.loop, f"{name}-engine")
        self.stop = asyncio.Event()
        surroundings = Surroundings(
            index=StoreClient(world.store, self.io, world.store.index),  # type: ignore[arg-type]
            membership=StoreClient(world.store, self.io, world.store.membership),  # type: ignore[arg-type]
            network=world.network.of(self.io),
            open_transports=partial(world.shared.open, self.io, self._check_owned),
            clock=world.clock,
            new_engine=self._new_engine,
            new_status_server=_NoStatusServer,  # type: ignore[arg-type]
            new_epoch=partial(world.rng.getrandbits, 63),
        )
        self.worker = Worker(self.config, self._identity(), surroundings)
        world.trace.note(name, f"starts as incarnation {self.starts}")
        self.task = self.io.start(self._live())
        self.task.add_done_callback(partial(self._ended, self.io))

    @property
    def alive(self) -> bool:
        return not self.io.dead

    def kill(self) -> None:
        """SIGKILL of the I/O process; the kernel ends the engine's with it."""
        self._world.trace.note(self.name, "is killed")
        self._die()

    def kill_engine(self) -> None:
        self._world.trace.note(self.name, "its engine is killed")
        self.engine.kill()

    def freeze(self) -> tuple[Process, Process]:
        """SIGSTOP of both processes, which `thaw` continues."""
        self.io.stop()
        self.engine_process.stop()
        self._world.network.stopped(self.io)
        return self.io, self.engine_process

    @staticmethod
    def thaw(io: Process, engine: Process) -> None:
        io.resume()
        engine.resume()

    def terminate(self, *, restart: bool) -> None:
        """SIGTERM."""
        self._wanted = restart
        self.stop.set()

    @property
    def role(self) -> str:
        return self.worker._incarnation.role

    @property
    def address(self) -> str:
        """Of its gRPC server; empty until it has one."""
        server = getattr(self.worker, "_server", None)
        return server.address if hasattr(server, "_port") else ""

    @property
    def engine_is_up(self) -> bool:
        return self.engine.engine is not None

    @property
    def leases(self) -> Any:
        return self.worker._server.leases if hasattr(self.worker, "_server") else None

    def complaints(self) -> list[str]:
        """What is not as it must be when nothing has gone on for a while."""
        found: list[str] = []
        if not self.alive:
            return found
        try:
            self.engine.check()
        except AssertionError as error:
            found.append(f"integrity: {error}")
        gauges = self.engine.gauges
        if gauges.blocks_free + gauges.blocks_cached != gauges.blocks_total:
            found.append(f"blocks in use when quiet: {gauges}")
        if not self.engine.idle.is_set():
            found.append(f"{self.engine.sequences} sequences open when quiet")
        if self.leases is not None and self.leases.open_leases:
            found.append(f"{self.leases.open_leases} leases open when quiet")
        if self.leases is not None and self.leases._parked:
            found.append(f"pulls parked when quiet: {list(self.leases._parked)}")
        return [f"{self.name}: {complaint}" for complaint in found]

    def sequences(self) -> list[str]:
        """The ids of those that its engine has."""
        engine = self.engine.engine
        return list(engine._sequences) if engine is not None and self.alive else []

    def overfull(self) -> str | None:
        """A queue above its bound, if there is one."""
        engine = self.engine.engine
        if engine is None or not self.alive:
            return None
        scheduler = engine._scheduler
        # Preempted sequences and further choices of admitted ones wait beside those the limit is for.
        bound = self.config.waiting_max + self.config.sequences_max
        waiting = {sequence.seq_id for sequence in scheduler.waiting}
        if len(waiting) > bound or len(scheduler.admitted) > self.config.sequences_max:
            return f"{self.name}: {len(waiting)} waiting, {len(scheduler.admitted)} admitted"
        if self.engine.sequences > bound:
            return f"{self.name}: {self.engine.sequences} sequences"
        return None

    def _check_owned(self, start: int, end: int) -> None:
        """Nothing may write into a block that was given back."""
        size = self.engine.block_bytes
        for block in range(start // size, -(-end // size)):
            if not self.engine.owns(block):
                self._world.on_bug(f"{self.name}: a read writes into block {block}, which nobody owns")

    async def _live(self) -> None:
        try:
            await self.worker.serve(self.stop)
        except EngineFailed as error:
            self._world.trace.note(self.name, f"ends: {error}")
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not self.io.dead:
                self._world.on_bug(f"{self.name} crashed: {error!r}")

    def _ended(self, io: Process, task: "asyncio.Task[None]") -> None:
        if io.dead:  # killed
            return
        self._world.trace.note(self.name, "has exited")
        self._die()
        # What is left then is cancelled, as asyncio.run does; it may not resist.
        self._world.loop.call_later(_LAST_TASKS_S, self._complain_of_tasks, io)

    def _complain_of_tasks(self, io: Process) -> None:
        for left in io.tasks():
            self._world.on_bug(f"{self.name} left a task behind: {left.get_coro()}")

    def _die(self) -> None:
        self.io.kill()
        self.engine_process.kill()
        self._world.network.died(self.io)
        if self._wanted:
            asyncio.get_running_loop().call_later(self._world.rng.uniform(0.3, 2.0), self._start_again)

    def _start_again(self) -> None:
        if self._wanted:
            self.start()

    def _new_engine(self, sequences_max: int, on_report: Any, clock: Clock) -> SimEngine:
        world = self._world
        self.engine = SimEngine(
            sequences_max,
            on_report,
            clock,
            io=self.io,
            process=self.engine_process,
            rng=world.rng,
            pace=world.pace,
            on_bug=world.on_bug,
            events=world.events,
            build=world.build_engine,
        )
        return self.engine

    def _identity(self) -> WorkerIdentity:
        config = self.config
        geometry = PoolGeometry(config.blocks, layers=1, kv_heads=1, block_size=config.block_size, head_dim=1)
        return WorkerIdentity(
            key=WorkerKey(self.name, self._world.rng.getrandbits(63)),
            files=SimpleNamespace(path="", config=SimpleNamespace(vocab_size=VOCAB)),  # type: ignore[arg-type]
            served_model=MODEL,
            geometry=geometry,
            compatibility=Compatibility(
                model=MODEL, revision="1", block_size=config.block_size, layout=geometry.layout
            ),
            context_tokens_max=geometry.blocks * geometry.block_size,
            threads=1,
        )


class _NoStatusServer:
    """Nobody asks a simulated worker for metrics, and its real server is a thread."""

    def __init__(self, *_: object) -> None:
        self.port = 0

    def close(self) -> None:
        pass
