"""The gRPC server of a worker. All services are always there: which new work they take is decided by the
worker's role of the moment (services/engine/incarnation.py)."""

from collections.abc import Callable

from services.core.clock import Clock
from services.core.errors import DiptychError, Draining
from services.decode.sequence import DecodeParts
from services.decode.service import DecodeService
from services.engine.handle import EngineHandle
from services.engine.incarnation import Incarnation
from services.engine.messages import Fetched, Landed
from services.engine.submission import SequenceBounds
from services.prefill.service import PrefillService
from services.transfer.fetch import FetchObserver, PrefixFetched, PrefixFetcher
from services.transfer.grpc_transport import serve_kv
from services.transfer.lease import LeaseEnd, LeaseTable
from services.transfer.pool_memory import PoolMemory
from services.transfer.server import KvServer
from services.wire.channel import Network
from services.wire.generated import worker_pb2_grpc
from services.worker.config import WorkerConfig
from services.worker.control import ControlService
from services.worker.identity import WorkerIdentity
from services.worker.lender import Lender
from services.worker.metrics import WorkerMetrics
from services.worker.transports import OpenTransports, parse_transports

_LAST_WORDS_S = 2.0  # for tokens and errors that are on their way when the server stops


class WorkerServer:
    def __init__(
        self,
        config: WorkerConfig,
        identity: WorkerIdentity,
        engine: EngineHandle,
        incarnation: Incarnation,
        metrics: WorkerMetrics,
        clock: Clock,
        network: Network,
        open_transports: OpenTransports,
        on_role: Callable[[], None],
    ) -> None:
        self._config = config
        self._identity = identity
        self._engine = engine
        self._incarnation = incarnation
        self._metrics = metrics
        self._clock = clock
        self._memory = PoolMemory(identity.geometry, engine.pool)
        self._bounds = SequenceBounds(identity.files.config.vocab_size, identity.context_tokens_max)
        self._network = network
        self._open_transports = open_transports
        self._server = network.new_server()
        self.leases = LeaseTable(clock, config.lease_ttl_s, self._lease_ended, self._memory.generation)
        self._on_role = on_role
        metrics.watch("diptych_worker_leases", "Open KV leases", lambda: self.leases.open_leases)

    @property
    def address(self) -> str:
        """host:port that other parts of the cluster reach this worker by; valid after `start`."""
        return f"{self._config.advertise_host or self._config.host}:{self._port}"

    async def start(self) -> None:
        """Raises ConfigError if the port is taken or no transport is here."""
        self._transports = await self._open_transports(
            parse_transports(self._config.transports),
            self._identity.key.worker_id,
            self._identity.compatibility,
            self._memory,
            self._network,
            self._clock,
        )
        self._fetcher = PrefixFetcher(
            self._transports.reading, self._memory, self._clock, self._fetch_observer()
        )
        self._add_kv()
        self._add_prefill()
        self._decode = self._add_decode()
        control = ControlService(self._incarnation, self._on_role)
        worker_pb2_grpc.add_ControlServicer_to_server(control, self._server)
        self._port = self._network.listen(self._server, self._config.host, self._config.port)
        await self._server.start()

    def hand_over(self) -> int:
        """Have what still runs go on elsewhere; how many sequences. Computed KV stays for its readers."""
        error = Draining("the worker hands its work over: it is about to stop")
        return self._decode.give_up(error) + self.leases.fail_unfinished(error)

    def begin_anew(self, error: DiptychError) -> None:
        """The worker is another incarnation now: nothing of the last one goes on."""
        self._decode.give_up(error)
        self.leases.fail_all(error)

    async def stop(self) -> None:
        """End what still runs, as to be done elsewhere: draining is over."""
        self.hand_over()
        self._decode.finish()
        await self._server.stop(_LAST_WORDS_S)
        await self._transports.close()

    def _add_prefill(self) -> None:
        service = PrefillService(
            self._engine,
            self.leases,
            self._incarnation,
            self._bounds,
            self._clock,
            self._config.pull_wait_s,
            self._metrics.on_failed,
            self._fetcher,
        )
        worker_pb2_grpc.add_PrefillServicer_to_server(service, self._server)

    def _add_kv(self) -> None:
        """Whatever its role: others may read what a worker has cached."""
        kv = KvServer(
            self.leases,
            self._memory,
            self._identity.compatibility,
            self._incarnation.is_current,
            self._clock,
            self._config.pull_wait_s,
            Lender(self._engine, self.leases, self._clock).lend,
            self._metrics.on_sent,
            self._transports.nixl_source,
        )
        serve_kv(kv, self._server)

    def _add_decode(self) -> DecodeService:
        parts = DecodeParts(
            self._engine,
            self._transports.reading,
            self._memory,
            self._clock,
            self._metrics.on_received,
            self._metrics.on_failed,
            self._metrics.on_pull_broke,
            self._fetcher,
        )
        service = DecodeService(parts, self._incarnation, self._bounds)
        worker_pb2_grpc.add_DecodeServicer_to_server(service, self._server)
        return service

    def _lease_ended(self, transfer_id: str, how: LeaseEnd) -> None:
        """The only way leased blocks come back to the engine."""
        self._fetcher.stop(transfer_id, then=lambda: self._engine.drop(transfer_id))
        self._metrics.on_lease_end(how)

    def _fetch_observer(self) -> FetchObserver:
        return FetchObserver(
            landed=lambda seq_id, tokens, proven: self._engine.send(Landed(seq_id, tokens, proven)),
            ended=self._fetch_ended,
            broke=self._metrics.on_pull_broke,
            compute_ms=self._compute_ms,
        )

    def _compute_ms(self, tokens: int, start: int) -> float:
        model = self._engine.gauges.model
        return model.prefill_ms(tokens, start) if model and model.knows_prefill else 0.0

    def _fetch_ended(self, seq_id: str, fetched: PrefixFetched) -> None:
        self._engine.send(Fetched(seq_id))
        self._metrics.on_prefix_fetched(fetched)
