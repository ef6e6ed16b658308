"""One worker process: an engine, the services its role turns on, and what the cluster hears of it.

identify ── engine process ── gRPC services ── index, membership ── until SIGTERM ── drain
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from services.core.child_tasks import ChildTasks
from services.core.clock import Clock, SystemClock
from services.core.errors import EngineFailed
from services.core.log import setup_logging
from services.core.worker_report import WorkerReport
from services.engine.handle import EngineHandle
from services.engine.incarnation import Incarnation
from services.engine.messages import EngineSetup, Limits, Report
from services.index.protocol import PrefixIndex
from services.index.redis_index import RedisPrefixIndex
from services.membership.protocol import Membership
from services.membership.redis_membership import RedisMembership
from services.wire.channel import TCP, Network
from services.worker.announcer import Announcer
from services.worker.config import WorkerConfig
from services.worker.grpc_server import WorkerServer
from services.worker.http import Check, StatusServer
from services.worker.identity import WorkerIdentity, identify
from services.worker.metrics import WorkerMetrics
from services.worker.publisher import IndexPublisher

_LIVE_S = 10.0  # an event loop that has not turned for this long is stuck

logger = logging.getLogger(__name__)


def run(config: WorkerConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ModelFileError, ConfigError or EngineFailed."""
    setup_logging("worker")
    identity = identify(config)
    asyncio.run(_serve(config, identity))


async def _serve(config: WorkerConfig, identity: WorkerIdentity) -> None:
    index, membership = RedisPrefixIndex(config.redis), RedisMembership(config.redis)
    await Worker(config, identity, Surroundings(index, membership)).serve(_stop_event())


@dataclass(frozen=True, slots=True)
class Surroundings:
    """All that a worker meets outside itself. What has a default is real; the simulator has others."""

    index: PrefixIndex
    membership: Membership
    network: Network = TCP
    clock: Clock = field(default_factory=SystemClock)
    new_engine: Callable[[int, Callable[[Report], None], Clock], EngineHandle] = EngineHandle
    new_status_server: Callable[[str, int, CollectorRegistry, dict[str, Check]], StatusServer] = StatusServer


class Worker:
    def __init__(self, config: WorkerConfig, identity: WorkerIdentity, surroundings: Surroundings) -> None:
        self._config = config
        self._identity = identity
        self._surroundings = surroundings
        self._clock = clock = surroundings.clock
        self._incarnation = Incarnation(identity.key)
        self._metrics = WorkerMetrics()
        sequences_max = config.sequences_max + config.waiting_max
        self._engine = surroundings.new_engine(sequences_max, self._on_report, clock)
        self._index, self._membership = surroundings.index, surroundings.membership
        self._publisher = IndexPublisher(self._index, identity.key, clock)
        self._announcer = Announcer(self._membership, identity.key, self._report, clock)

    async def serve(self, stop: asyncio.Event) -> None:
        """The whole life of the process, which `stop` asks to drain."""
        await self._engine.start(self._engine_setup())
        self._server = WorkerServer(
            self._config,
            self._identity,
            self._engine,
            self._incarnation,
            self._metrics,
            self._clock,
            self._surroundings.network,
        )
        await self._server.start()
        self._status = self._surroundings.new_status_server(
            self._config.host,
            self._config.metrics_port,
            self._metrics.registry,
            {"/health/live": self._is_live, "/health": self._is_live, "/health/ready": self._is_ready},
        )
        try:
            await self._work(stop)
        finally:
            await self._close()

    async def _work(self, stop: asyncio.Event) -> None:
        """Serve until asked to stop, then drain. Raises EngineFailed if the engine dies."""
        async with ChildTasks() as tasks:
            background = [
                tasks.start(self._announcer.run()),
                tasks.start(self._publisher.run()),
                tasks.start(self._server.leases.expire_forever()),
            ]
            tasks.start(self._engine.watch(self._config.step_stalled_s))
            ending = [tasks.start(stop.wait()), tasks.start(self._engine.failed.wait())]
            logger.info(
                "ready on %s", self._server.address, extra={"worker_id": self._identity.key.worker_id}
            )
            await asyncio.wait([*background, *ending], return_when=asyncio.FIRST_COMPLETED)
            for task in background:
                if task.done():
                    task.result()  # they never end by themselves: this raises
            if self._engine.failed.is_set():
                raise EngineFailed("the engine process died; restart the worker")
            await self._drain()

    async def _drain(self) -> None:
        """No new work; what runs may finish within the grace period."""
        self._incarnation.draining = True
        self._announcer.changed()
        logger.info("draining %d sequences", self._engine.sequences)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_grace_s):
                await self._engine.idle.wait()

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
            geometry=identity.geometry,
            compatibility=identity.compatibility,
            limits=Limits(
                sequences_max=config.sequences_max,
                waiting_max=config.waiting_max,
                chunk_tokens_max=config.chunk_tokens_max,
                step_ms_target=config.step_ms_target,
            ),
        )

    def _on_report(self, report: Report) -> None:
        self._metrics.on_report(report)
        self._publisher.record(report.stored, report.evicted)
        self._announcer.changed()

    def _report(self) -> WorkerReport:
        identity, gauges = self._identity, self._engine.gauges
        host = self._config.advertise_host or self._config.host
        return WorkerReport(
            worker_id=identity.key.worker_id,
            epoch=identity.key.epoch,
            role=self._config.role,
            state="draining" if self._incarnation.draining else "ready",
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
            prefill_ms_per_token=gauges.prefill_ms_per_token,
            decode_step_ms=gauges.decode_step_ms,
            prefix_hit_tokens=gauges.prefix_hit_tokens,
            prompt_tokens=gauges.prompt_tokens,
        )

    def _is_live(self) -> bool:
        return self._clock.now() - self._announcer.turned_at_s < _LIVE_S

    def _is_ready(self) -> bool:
        return self._is_live() and not self._incarnation.draining and not self._engine.failed.is_set()


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
