"""One worker process: an engine, the services its role turns on, and what the cluster hears of it.

identify ── engine process ── gRPC services ── index, membership ── until SIGTERM ── drain
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import uvloop
from prometheus_client import CollectorRegistry

from services.core.child_tasks import ChildTasks
from services.core.clock import Clock, SystemClock
from services.core.errors import EngineFailed, StoreUnavailable, WorkerLost
from services.core.log import setup_logging
from services.core.malloc import keep_freed_memory
from services.core.worker_report import State, WorkerReport
from services.engine.handle import EngineHandle
from services.engine.incarnation import BEAT_S, Incarnation, random_epoch
from services.engine.messages import EngineSetup, Limits, Report
from services.index.protocol import PrefixIndex
from services.index.redis_index import RedisPrefixIndex
from services.membership.protocol import LEASE_S, Membership
from services.membership.redis_membership import RedisMembership
from services.wire.channel import TCP, Network
from services.wire.cluster_lock import ClusterLock, check_reachable, lock_network
from services.worker.announcer import Announcer
from services.worker.config import WorkerConfig
from services.worker.grpc_server import WorkerServer
from services.worker.http import Check, StatusServer
from services.worker.identity import WorkerIdentity, identify
from services.worker.metrics import WorkerMetrics
from services.worker.publisher import IndexPublisher
from services.worker.transports import OpenTransports, open_transports

_LIVE_S = 10.0  # an event loop that has not turned for this long is stuck
_NOTICED_S = 0.4  # then all gateways know that this worker drains; they look every 100 ms

logger = logging.getLogger(__name__)


def run(config: WorkerConfig, lock: ClusterLock) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ModelFileError, ConfigError or EngineFailed."""
    setup_logging("worker")
    check_reachable(lock, config.host)
    network = lock_network(lock)
    keep_freed_memory()
    identity = identify(config)
    uvloop.run(_serve(config, identity, network))


async def _serve(config: WorkerConfig, identity: WorkerIdentity, network: Network) -> None:
    index, membership = RedisPrefixIndex(config.redis), RedisMembership(config.redis)
    await Worker(config, identity, Surroundings(index, membership, network)).serve(*_stop_events())


@dataclass(frozen=True, slots=True)
class Surroundings:
    """All that a worker meets outside itself. What has a default is real; the simulator has others."""

    index: PrefixIndex
    membership: Membership
    network: Network = TCP
    open_transports: OpenTransports = open_transports
    clock: Clock = field(default_factory=SystemClock)
    new_engine: Callable[[int, Callable[[Report], None], Clock], EngineHandle] = EngineHandle
    new_status_server: Callable[[str, int, CollectorRegistry, dict[str, Check]], StatusServer] = StatusServer
    new_epoch: Callable[[], int] = random_epoch


class Worker:
    def __init__(self, config: WorkerConfig, identity: WorkerIdentity, surroundings: Surroundings) -> None:
        self._config = config
        self._identity = identity
        self._surroundings = surroundings
        self._clock = clock = surroundings.clock
        self._incarnation = Incarnation(identity.key, config.role, clock, LEASE_S, surroundings.new_epoch)
        self._metrics = WorkerMetrics()
        self._metrics.watch_state(lambda: self.state)
        sequences_max = config.sequences_max + config.waiting_max
        self._engine = surroundings.new_engine(sequences_max, self._on_report, clock)
        self._index, self._membership = surroundings.index, surroundings.membership
        self._publisher = IndexPublisher(self._index, self._incarnation, clock, config.index_blocks_max)
        self._announcer = Announcer(self._membership, self._report, clock)

    @property
    def state(self) -> State:
        if self._incarnation.draining:
            return "draining"
        return "stalled" if self._engine.overdue else "ready"

    async def serve(self, stop: asyncio.Event, at_once: asyncio.Event | None = None) -> None:
        """The whole life of the process: `stop` asks it to drain, `at_once` ends the draining."""
        await self._engine.start(self._engine_setup())
        self._server = WorkerServer(
            self._config,
            self._identity,
            self._engine,
            self._incarnation,
            self._metrics,
            self._clock,
            self._surroundings.network,
            self._surroundings.open_transports,
            on_role=self._announcer.changed,
        )
        await self._server.start()
        self._status = self._surroundings.new_status_server(
            self._config.host,
            self._config.metrics_port,
            self._metrics.registry,
            {"/health/live": self._is_live, "/health": self._is_live, "/health/ready": self._is_ready},
        )
        try:
            await self._work(stop, at_once or asyncio.Event())
        finally:
            await self._close()

    async def _work(self, stop: asyncio.Event, at_once: asyncio.Event) -> None:
        """Serve until asked to stop, then drain. Raises EngineFailed if the engine dies."""
        self._incarnation.begin()
        async with ChildTasks() as tasks:
            background = [
                tasks.start(self._beat()),
                tasks.start(self._announcer.run()),
                tasks.start(self._publisher.run()),
                tasks.start(self._server.leases.expire_forever()),
            ]
            config = self._config
            watching = tasks.start(
                self._engine.watch(config.step_overdue_s, config.step_stalled_s, self._on_overdue)
            )
            ending = [tasks.start(stop.wait()), tasks.start(self._engine.failed.wait())]
            logger.info(
                "ready on %s", self._server.address, extra={"worker_id": self._identity.key.worker_id}
            )
            await asyncio.wait([*background, watching, *ending], return_when=asyncio.FIRST_COMPLETED)
            for task in (*background, watching):
                if task.done():
                    task.result()  # raises, unless it is the watch, whose end is the engine's
            if watching.done():
                await self._engine.failed.wait()
            if self._engine.failed.is_set():
                raise EngineFailed("the engine process died; restart the worker")
            await self._drain(at_once)

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep(BEAT_S)
            stood_still_s = self._incarnation.silent_s
            if self._incarnation.beat():
                self._begin_anew(stood_still_s)

    def _begin_anew(self, stood_still_s: float) -> None:
        """The cluster has taken this worker for dead and gone on without it."""
        logger.warning("stood still for %.1f s: from now on another incarnation", stood_still_s)
        self._metrics.epochs.inc()
        self._server.begin_anew(WorkerLost("the worker stood still and is another incarnation now"))
        self._publisher.begin_anew()
        self._announcer.changed()

    def _on_overdue(self, overdue: bool) -> None:
        if overdue:
            self._metrics.engine_overdue.inc()
        self._announcer.changed()

    async def _drain(self, at_once: asyncio.Event) -> None:
        """No new work; what runs may finish within the grace period, or goes on elsewhere before its end."""
        self._incarnation.draining = True
        self._announcer.changed()
        logger.info("draining %d sequences", self._engine.sequences)
        grace_s = self._config.drain_grace_s
        last_s = min(self._config.drain_handover_s, grace_s / 2)
        noticed_s = min(_NOTICED_S, grace_s - last_s)
        await self._until(noticed_s, at_once)
        await self._until(grace_s - last_s - noticed_s, self._engine.idle, at_once)
        if not self._engine.idle.is_set() and not at_once.is_set() and await self._others_serve():
            handed_over = self._server.hand_over()
            self._metrics.handovers.inc(handed_over)
            logger.info("handed %d sequences over", handed_over)
        await self._until(last_s, self._engine.idle, at_once)

    async def _until(self, at_most_s: float, *events: asyncio.Event) -> None:
        """Wait for one of the events."""
        async with ChildTasks() as tasks:
            waits = [tasks.start(self._clock.sleep(at_most_s)), *(tasks.start(e.wait()) for e in events)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)

    async def _others_serve(self) -> bool:
        """Whether another worker could take a request over; without membership nobody knows of any."""
        try:
            reports = await self._membership.workers()
        except StoreUnavailable:
            return False
        worker_id, model = self._identity.key.worker_id, self._identity.served_model
        return any(
            other.worker_id != worker_id
            and other.served_model == model
            and other.decodes
            and other.state == "ready"
            for other in reports
        )

    async def _close(self) -> None:
        await self._announcer.leave()
        await self._publisher.forget()
        await self._server.stop()
        await self._engine.stop()
        self._status.close()
        await self._index.close()
        await self._membership.close()

    def _engine_setup(self) -> EngineSetup:
        config, identity = self._config, self._identity
        return EngineSetup(
            model=str(identity.files.path),
            device=config.device,
            threads=identity.threads,
            cores=identity.cores,
            geometry=identity.geometry,
            compatibility=identity.compatibility,
            limits=Limits(
                sequences_max=config.sequences_max,
                waiting_max=config.waiting_max,
                chunk_tokens_max=config.chunk_tokens_max,
                step_ms_target=config.step_ms_target,
            ),
            compiled=config.compile,
        )

    def _on_report(self, report: Report) -> None:
        self._metrics.on_report(report)
        self._publisher.record(report.stored, report.evicted)
        self._announcer.load_changed()

    def _report(self) -> WorkerReport:
        identity, gauges = self._identity, self._engine.gauges
        host = self._config.advertise_host or self._config.host
        return WorkerReport(
            worker_id=self._incarnation.key.worker_id,
            epoch=self._incarnation.key.epoch,
            role=self._incarnation.role,
            state=self.state,
            address=self._server.address,
            metrics_url=f"http://{host}:{self._status.port}/metrics",
            served_model=identity.served_model,
            compatibility=identity.compatibility,
            context_tokens_max=identity.context_tokens_max,
            blocks_total=identity.geometry.blocks,
            blocks_free=gauges.blocks_free if gauges.blocks_total else identity.geometry.blocks,
            blocks_cached=gauges.blocks_cached,
            running=gauges.running,
            waiting=gauges.waiting,
            queued_prefill_tokens=gauges.queued_prefill_tokens,
            queued_prefill_context=gauges.queued_prefill_context,
            running_context=gauges.running_context,
            model=gauges.model,
            chunk_tokens_max=self._config.chunk_tokens_max,
            sequences_max=self._config.sequences_max,
            load_age_ms=1e3 * (self._clock.now() - self._engine.gauges_at),
            newest=gauges.newest,
            prefix_hit_tokens=gauges.prefix_hit_tokens,
            prompt_tokens=gauges.prompt_tokens,
        )

    def _is_live(self) -> bool:
        return self._incarnation.silent_s < _LIVE_S

    def _is_ready(self) -> bool:
        return self._is_live() and self.state == "ready" and not self._engine.failed.is_set()


def _stop_events() -> tuple[asyncio.Event, asyncio.Event]:
    """The first signal asks to drain, the second one to end at once."""
    stop, at_once = asyncio.Event(), asyncio.Event()

    def ask() -> None:
        (at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    return stop, at_once
