"""One run: a cluster, its clients and its faults, all from a seed; then everything that must hold.

clients ── HTTP ──> gateways ── gRPC ──> workers (I/O and engine process each)      store
   production classes from the gateway's Exchange down, over tests.sim's network, store and clock
"""

import asyncio
import gc
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from services.gateway.config import GatewayConfig
from services.worker.config import WorkerConfig
from tests.sim.engine import Pace
from tests.sim.faults import Faults
from tests.sim.gateway import HttpCall, SimGateway
from tests.sim.loop import LoopClock, Process, Stuck, VirtualLoop
from tests.sim.network import SimNetwork
from tests.sim.one_sided import SharedMemory
from tests.sim.received import Received
from tests.sim.store import SimStore
from tests.sim.trace import Trace, TracedLogs
from tests.sim.worker import SimWorker, World, toy_messages
from tests.sim.workload import Request, Workload

REQUEST_TIMEOUT_S = 60.0
ATTEMPTS_MAX = 6
# Errors that tell a client to come back later. Others are excused by as many faults as there are attempts;
# the deadline never is: long before it, all faults are over and everything works.
CAPACITY_ERRORS = frozenset({"overloaded", "no_worker"})
_GATEWAY_LINKS = ("cut_gateway", "silence", "delay")
LEFT_S = 1.5  # the longest step is shorter
QUIET_S = 12.0  # after which every lease, wait and keepalive is over


@dataclass(slots=True)
class Result:
    seed: int
    digest: str = ""
    complaints: list[str] = field(default_factory=list)
    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)  # ok, left, lost, or an error's label
    faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)  # what the faults and the load brought about
    virtual_s: float = 0.0
    lines: list[str] = field(default_factory=list)


def simulate(seed: int, *, build_engine: Any = None, sabotage: Any = None, verbose: bool = False) -> Result:
    """Run one seed. `build_engine` and `sabotage(world)` put something broken in, to see it found."""
    result = Result(seed)
    loop = VirtualLoop(seed)
    asyncio.set_event_loop(loop)
    collects = gc.isenabled()
    gc.disable()  # finalizers must not depend on when Python collects
    try:
        run = _Run(loop, seed, result, build_engine, sabotage)
        loop.set_exception_handler(run.unhandled)
        with toy_messages(), run.logging(verbose):
            loop.run_until_complete(run.whole())
    except Stuck as error:
        result.complaints.append(str(error))
    finally:
        result.virtual_s = loop.time()
        result.digest, result.lines = run.trace.digest, run.trace.lines
        _discard(loop)
        if collects:
            gc.enable()
    return result


def without_log(seed: int) -> Result:
    """The result of one seed, small enough to keep thousands of."""
    result = simulate(seed)
    result.lines = []
    return result


def _discard(loop: VirtualLoop) -> None:
    """Let go of whatever a failed run left."""
    loop.set_exception_handler(lambda loop, context: None)
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    asyncio.set_event_loop(None)
    loop.close()


class _Run:
    def __init__(
        self, loop: VirtualLoop, seed: int, result: Result, build_engine: Any, sabotage: Any
    ) -> None:
        self.loop, self.result = loop, result
        self.rng = rng = random.Random(f"simulation {seed}")
        self.trace = Trace(loop)
        clock = LoopClock(loop)
        network = SimNetwork(random.Random(f"network {seed}"), self.trace, self.bug)
        store = SimStore(clock, random.Random(f"store {seed}"))
        shared = SharedMemory(network, random.Random(f"reads {seed}"))
        self.world = World(
            *(loop, clock, rng, self.trace, network, store, shared, self.bug, Pace.of(rng)),
            build_engine=build_engine,
        )
        self._sabotage = sabotage

    def bug(self, what: str) -> None:
        self.trace.note("BUG", what)
        self.result.complaints.append(what)

    def unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        task = context.get("task") or context.get("future")
        process = getattr(task, "process", None)
        if process is None or not process.dead:
            self.bug(f"unhandled: {context['message']} {context.get('exception')!r} {task}")

    def logging(self, verbose: bool) -> TracedLogs:
        return TracedLogs(self.trace, self.world.events, logging.DEBUG if verbose else logging.INFO)

    async def whole(self) -> None:
        self._build()
        if self._sabotage is not None:
            self._sabotage(self)
        self._clients = Process(self.loop, "clients")
        faulting = self.loop.create_task(self.faults.run())
        watching = self.loop.create_task(self._watch())
        clients = [self._clients.start(self._client(request)) for request in self.requests]
        late = self.requests[-1].at_s + 2 * REQUEST_TIMEOUT_S + 30.0
        self.loop.call_later(self.requests[-1].at_s + self.rng.uniform(0.0, 5.0), faulting.cancel)
        _, hanging = await asyncio.wait(clients, timeout=late)
        for task in hanging:
            self.bug(f"a client waits for ever: {task.get_coro()}")
            task.cancel()
        faulting.cancel()
        await self._become_quiet()
        watching.cancel()
        self._check_quiet()
        await self._shut_down()
        self._count()

    def _build(self) -> None:
        rng = self.rng
        self._gentle = rng.random() < 0.3
        self._draw_settings()
        self.workers = [
            SimWorker(self.world, self._worker_config(name, role)) for name, role in self._roles()
        ]
        context = min(worker.config.blocks * worker.config.block_size for worker in self.workers)
        config = GatewayConfig(
            seed=rng.getrandbits(32) + 1,
            route_split=rng.choice(["auto", "auto", "always", "never"]),
            inflight_max=256 if self._gentle else rng.choice([16, 256]),
            request_timeout_s=REQUEST_TIMEOUT_S,
            queue_length_max=512 if self._gentle else rng.choice([4, 512]),
            queue_tokens_max=1 << 20 if self._gentle else rng.choice([1000, 1 << 20]),
            ttft_max_s=1e6 if self._gentle else rng.choice([2.0, 10.0, 120.0]),
            worker_queue_ms_max=rng.choice([0.0, 50.0, 200.0, 1e6]),
            decode_share=rng.choice([0.5, 1.0, 1.0, 4.0]),
            admission_timeout_s=REQUEST_TIMEOUT_S if self._gentle else 30.0,
            no_worker_timeout_s=15.0,
            attempts_max=ATTEMPTS_MAX,
        )
        self.gateways = [
            SimGateway(self.world, f"g{n}", config, context) for n in range(1, rng.randint(1, 2) + 1)
        ]
        workload = Workload(random.Random(rng.getrandbits(64)), context)
        count = rng.randint(60, 100) if rng.random() < 0.1 else rng.randint(10, 40)
        self.requests = workload.requests(count, within_s=rng.uniform(2.0, 20.0))
        for request in self.requests:
            request.at_s += 1.0  # when the workers are up
        self.result.requests = len(self.requests)
        mean_s = 2.0 if self._gentle else rng.choice([0.3, 0.8, 2.0])
        operator = Process(self.loop, "operator")
        self.faults = Faults(
            *(self.world, self.workers, self.gateways, rng, mean_s, operator), gentle=self._gentle
        )

    def _roles(self) -> list[tuple[str, Any]]:
        rng = self.rng
        fewest = 2 if self._gentle else 1
        if rng.random() < 0.15:
            return [(f"b{n}", "both") for n in range(1, rng.randint(2, 4) + 1)]
        prefills = [(f"p{n}", "prefill") for n in range(1, rng.randint(fewest, 3) + 1)]
        decodes = [(f"d{n}", "decode") for n in range(1, rng.randint(fewest, 3) + 1)]
        return prefills + decodes

    def _draw_settings(self) -> None:
        rng = self.rng
        self._block_sizes = rng.choice([[4], [8], [16], [4, 8, 16]])
        # One-sided reads need equal blocks.
        choices = ["grpc", "nixl,grpc", *(["nixl"] if len(self._block_sizes) == 1 else [])]
        self._transports = rng.choice(choices)
        self._port = rng.choice([0, 7000])  # a restarted worker may have its old address
        self._settings = {
            "sequences_max": rng.choice([4, 8, 16]),
            "waiting_max": rng.choice([2, 8, 32]),
            "chunk_tokens_max": rng.choice([8, 32, 128]),
            "lease_ttl_s": rng.choice([1.0, 3.0]),
            "pull_wait_s": rng.choice([3.0, 5.0]),
            "drain_grace_s": rng.choice([1.0, 5.0]),
            "drain_handover_s": rng.choice([0.5, 2.0]),
            "step_overdue_s": rng.choice([1.0, 2.5]),
            "step_stalled_s": rng.choice([3.0, 8.0]),
        }

    def _worker_config(self, name: str, role: Any) -> WorkerConfig:
        block_size, tokens = self.rng.choice(self._block_sizes), self.rng.choice([128, 256, 512])
        return WorkerConfig(
            role=role,
            worker_id=name,
            host=name,
            port=self._port,
            redis="simulated",
            block_size=block_size,
            transports=self._transports,
            blocks=tokens // block_size,
            **self._settings,
        )

    # Clients

    async def _client(self, request: Request) -> None:
        """Ask, again if the gateway dies, and check the answer."""
        await asyncio.sleep(request.at_s)
        for number in range(5):
            gateway = self._some_gateway()
            if gateway is None:
                await asyncio.sleep(0.5)
                continue
            call = HttpCall(request.body, request.headers, request.read_s)
            gateway.open(f"{request.name}-{number}", call)
            if not await self._wait(call, request):
                self._ended(request, "left")
                self.loop.call_later(LEFT_S, self._check_left, request, self.faults.disturbances)
                return
            if call.whole:
                self._ended(request, self._outcome(request, call))
                return
            self.trace.note(request.name, f"loses its connection to {gateway.name}")
        self._ended(request, "lost")

    def _some_gateway(self) -> SimGateway | None:
        alive = [gateway for gateway in self.gateways if gateway.alive]
        return self.rng.choice(alive) if alive else None

    async def _wait(self, call: HttpCall, request: Request) -> bool:
        """False: the client has left."""
        try:
            async with asyncio.timeout(request.leaves_after_s):
                await call.over.wait()
        except TimeoutError:
            call.gone.set()
            return False
        return True

    def _ended(self, request: Request, outcome: str) -> None:
        self.trace.note(request.name, f"ends: {outcome}")
        self.result.outcomes[outcome] += 1

    def _outcome(self, request: Request, call: HttpCall) -> str:
        if call.error:
            self._excuse(request, call.error)
            return call.error
        received = Received(call, streams=request.streams)
        if received.error:
            self._excuse(request, received.error)
            return received.error
        self.world.events["fetched_tokens"] += received.timings.get("fetched_tokens", 0)
        for complaint in received.differences(request):
            self.bug(f"{request.name}: {complaint}")
        return "ok"

    def _excuse(self, request: Request, error: str) -> None:
        """Complain about an error that the faults do not explain. Where one kind of fault alone strikes,
        and not at the last worker, no client may notice any; a gateway may lose its way to all of them."""
        if self._gentle and self.faults.only not in _GATEWAY_LINKS:
            self.bug(f"{request.name} failed with {error} though only {self.faults.only} struck")
            return
        suffered = sum(request.at_s - 5.0 <= at <= self.loop.time() for at in self.faults.harms)
        if error == "deadline_exceeded":
            self.bug(f"{request.name} was still waiting at its deadline")
        elif error not in CAPACITY_ERRORS and suffered < ATTEMPTS_MAX:
            self.bug(f"{request.name} failed with {error} after only {suffered} faults")

    # Checks

    def _check_left(self, request: Request, disturbances: int) -> None:
        """A request whose client is gone is worked on no more, unless a fault kept the news from somebody."""
        if self.faults.disturbances != disturbances or self.faults.lasting:
            return
        for worker in self.workers:
            for seq_id in worker.sequences():
                if seq_id.startswith(f"{request.name}-"):
                    self.bug(f"{worker.name} works on {seq_id} though its client has left")

    async def _watch(self) -> None:
        """Bounds that hold at any moment."""
        while True:
            await asyncio.sleep(0.1)
            for part in (*self.workers, *self.gateways):
                if overfull := part.overfull():
                    self.bug(f"a queue is over its bound: {overfull}")

    async def _become_quiet(self) -> None:
        self.faults.heal()
        await asyncio.sleep(QUIET_S)

    def _check_quiet(self) -> None:
        for part in (*self.workers, *self.gateways):
            for complaint in part.complaints():
                self.bug(complaint)
        for call in self.world.network.calls:
            if call.name != "Session":
                self.bug(f"a {call.name} from {call.client.name} to {call.host} is open when quiet")

    async def _shut_down(self) -> None:
        """End every process in the proper way; nothing may be left."""
        for gateway in self.gateways:
            if gateway.alive:
                await gateway.process.start(gateway.close())
        for worker in self.workers:
            worker.terminate(restart=False)
        await asyncio.sleep(QUIET_S)
        own = asyncio.current_task()
        for task in sorted(asyncio.all_tasks(self.loop), key=lambda task: task.number):  # type: ignore[attr-defined]
            if task is not own:
                self.bug(f"a task is left at the end: {task.get_coro()}")
        if self.world.network.calls:
            self.bug(f"calls are left at the end: {[call.path for call in self.world.network.calls]}")

    def _count(self) -> None:
        self.result.faults = self.faults.counts
        if self.world.network.flipped:
            self.result.faults["flip"] = self.world.network.flipped
        self.result.faults["client_leaves"] = self.result.outcomes["left"]
        self.result.events = self.world.events
        self.result.events["one_sided_reads"] = self.world.shared.reads
