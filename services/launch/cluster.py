"""A whole cluster on this machine: Valkey, prefill and decode workers, a gateway, as processes.

The workers and the gateway are the same commands that a person would type (`diptych worker ...`).
They start together and are ready in any order; they stop front to back, so that each drains what it
has before the part behind it goes: gateway, workers, Valkey.
"""

import asyncio
import os
import secrets
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from services.core.clock import SystemClock
from services.core.errors import ConfigError
from services.core.usable_cores import usable_cores
from services.launch.child import STOP_GRACE_SECONDS, Child, ChildSpec
from services.launch.cores import CoreFile, thread_environment, threads_per_worker
from services.launch.display import Display
from services.launch.https import trusting_only
from services.launch.readiness import PROBE_EVERY_SECONDS, GatewayReadiness, WorkerReadiness
from services.launch.store_process import StoreProcess
from services.launch.supervisor import Part, keep_running, start_until_ready
from services.membership.redis_membership import RedisMembership
from services.wire.cluster_lock import ClusterLock

# A cold start reads hundreds of megabytes and imports torch, perhaps from a slow disk.
READY_TIMEOUT_SECONDS = 300.0
GATEWAY_SEES_WORKERS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What to start. `logs` None: the parts write to our own stderr."""

    prefill: int  # workers of each role
    decode: int
    host: str  # of the gateway
    port: int
    model: Path
    dtype: str
    logs: Path | None
    quantization: str = "auto"  # of the weights
    compile: bool = False  # the torch model
    kv_cache_dtype: str = "auto"
    redis: str = ""  # empty: an embedded Valkey
    threads: int = 0  # per worker; 0: an equal share of the cores, and what the others leave idle
    blocks: int = 0  # KV blocks per worker; 0: the worker's default
    config: Path | None = None
    route_split: str = ""  # empty: the gateway's own setting
    policy: str = ""  # the same
    keys: str = ""  # the same, and of the next one
    open: bool = False
    lock: ClusterLock = field(default_factory=ClusterLock)
    tls_cert: Path | None = None  # of the gateway, whose settings have it: it speaks https

    @property
    def gateway_url(self) -> str:
        """The gateway's root, as this machine reaches it."""
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        scheme = "https" if self.tls_cert else "http"
        return f"{scheme}://{f'[{local}]' if ':' in local else local}:{self.port}"


class LocalCluster:
    def __init__(self, plan: ClusterPlan, display: Display) -> None:
        self._plan = plan
        self._display = display
        self._clock = SystemClock()
        self._store = None if plan.redis else StoreProcess()
        self._membership: RedisMembership | None = None
        self._workers: list[Child] = []
        self._worker_ids: set[str] = set()
        self._cores: CoreFile | None = None
        self._gateway: Child | None = None
        self._watches: list[asyncio.Task[None]] = []

    @property
    def redis_url(self) -> str:
        """Valid once the cluster has started."""
        return self._store.url if self._store else self._plan.redis

    async def start(self) -> None:
        """Start everything, wait until all of it is ready, then keep it running in the background.

        Raises ConfigError or WorkerLost. Call `stop` also after a failed start.
        """
        if self._store is not None:
            self._store.start()
        self._membership = RedisMembership(self.redis_url)
        if not self._plan.threads:
            self._cores = CoreFile(self._plan.prefill + self._plan.decode)
        self._workers = [
            self._worker(role, number)
            for role, count in (("prefill", self._plan.prefill), ("decode", self._plan.decode))
            for number in range(count)
        ]
        cert = self._plan.tls_cert
        verify = trusting_only(cert) if cert else True
        gateway_readiness = GatewayReadiness(self._plan.gateway_url, verify)
        self._gateway = Child(self._gateway_spec(), gateway_readiness)
        await self._wait_until_ready([*self._workers, self._gateway])
        # The last worker may be ready before the gateway has seen it: then the first request would not
        # find it. A worker that died in this moment is no reason to wait for long.
        with suppress(TimeoutError):
            async with asyncio.timeout(GATEWAY_SEES_WORKERS_SECONDS):
                while not await gateway_readiness.knows(self._worker_ids):
                    await self._clock.sleep(PROBE_EVERY_SECONDS)
        parts: list[Part] = [*([self._store] if self._store else []), *self._workers, self._gateway]
        self._watches = [asyncio.create_task(self._watch(part)) for part in parts]

    async def stop(self, grace_s: float = STOP_GRACE_SECONDS) -> None:
        """Stop everything that runs; when cancelled, at once. Leaves no process behind."""
        for watch in self._watches:
            watch.cancel()
        try:
            if self._gateway is not None:
                await self._gateway.stop(grace_s)
            await asyncio.gather(*(worker.stop(grace_s) for worker in self._workers))
            if self._membership is not None:
                await self._membership.close()
        finally:
            for child in [*([self._gateway] if self._gateway else []), *self._workers]:
                child.kill()
            if self._cores is not None:
                self._cores.close()
            if self._store is not None:
                self._store.stop()

    async def _watch(self, part: Part) -> None:
        await keep_running(part, self._display.line, self._clock)

    async def _wait_until_ready(self, children: list[Child]) -> None:
        with self._display.waiting([child.name for child in children]) as ready:

            async def bring_up(child: Child) -> None:
                await start_until_ready(child, READY_TIMEOUT_SECONDS)
                ready(child.name)

            tasks = [asyncio.create_task(bring_up(child)) for child in children]
            try:
                await asyncio.gather(*tasks)  # the first failure ends the wait for all
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _worker(self, role: str, number: int) -> Child:
        assert self._membership is not None
        name = f"{role}-{number}"
        # In a Redis of its own a plain name is unique; in a shared one other clusters have it too.
        worker_id = f"{name}-{secrets.token_hex(3)}" if self._plan.redis else name
        workers = self._plan.prefill + self._plan.decode
        threads = self._plan.threads or threads_per_worker(usable_cores(), workers)
        flags = ["--role", role, "--worker-id", worker_id, *self._common_flags()]
        flags += ["--dtype", self._plan.dtype, "--quantization", self._plan.quantization]
        flags += ["--compile"] if self._plan.compile else []
        flags += ["--kv-cache-dtype", self._plan.kv_cache_dtype]
        flags += ["--threads", str(threads)]
        if self._cores is not None:
            flags += ["--core-slots", str(self._cores.path), "--core-slot", str(len(self._worker_ids))]
        flags += ["--blocks", str(self._plan.blocks)] if self._plan.blocks else []
        environment = {**self._environment("worker"), **thread_environment(threads)}
        self._worker_ids.add(worker_id)
        spec = ChildSpec(name, diptych("worker", *flags), environment, self._log(name))
        return Child(spec, WorkerReadiness(self._membership, worker_id))

    def _gateway_spec(self) -> ChildSpec:
        flags = ["--host", self._plan.host, "--port", str(self._plan.port), *self._common_flags()]
        flags += ["--route-split", self._plan.route_split] if self._plan.route_split else []
        flags += ["--policy", self._plan.policy] if self._plan.policy else []
        flags += ["--keys", self._plan.keys] if self._plan.keys else []
        flags += ["--open"] if self._plan.open else []
        return ChildSpec(
            "gateway", diptych("gateway", *flags), self._environment("gateway"), self._log("gateway")
        )

    def _common_flags(self) -> list[str]:
        config = ["--config", str(self._plan.config)] if self._plan.config else []
        return ["--model", str(self._plan.model), *config]

    def _environment(self, section: str) -> dict[str, str]:
        """Secrets go here, not into flags: every user of this machine can read command lines."""
        secret = {"DIPTYCH_CLUSTER__TOKEN": self._plan.lock.token} if self._plan.lock.token else {}
        return {**_log_format(), f"DIPTYCH_{section.upper()}__REDIS": self.redis_url, **secret}

    def _log(self, name: str) -> Path | None:
        """The part's log file, empty; that of the previous cluster stays as NAME.log.1."""
        if self._plan.logs is None:
            return None
        self._plan.logs.mkdir(parents=True, exist_ok=True)
        log = self._plan.logs / f"{name}.log"
        if log.exists():
            os.replace(log, log.with_suffix(".log.1"))
        log.touch()
        return log


def diptych(*arguments: str) -> tuple[str, ...]:
    """The command line of `diptych ARGUMENTS`, the installed script where there is one."""
    script = Path(sys.executable).with_name("diptych")
    program = [str(script)] if script.exists() else ["-m", "services.launch.cli"]
    return (sys.executable, *program, *arguments)


def _log_format() -> dict[str, str]:
    """A person reads the logs of a local cluster: text, unless they chose otherwise."""
    return {"DIPTYCH_LOG_FORMAT": os.environ.get("DIPTYCH_LOG_FORMAT") or "text"}


def claim_port(host: str, port: int) -> int:
    """`port` if it is free on `host`, a free one for 0. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: a port whose last connections are still fading away is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error.strerror}; "
                f"stop what listens there, or pass another --port (0: any free one)"
            ) from error
        return int(probe.getsockname()[1])
