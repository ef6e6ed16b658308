"""A real cluster for end-to-end tests: `diptych up` as a child process, and what can be seen of it.

Everything is observed as an operator would: the lines that `up` prints, the process table, the
workers' reports in Valkey and the /metrics pages.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import psutil

from services.core.errors import StoreUnavailable
from services.core.parent_death import dying_with_parent
from services.core.worker_report import WorkerReport
from services.launch.authority import create_authority
from services.launch.cluster_state import ClusterState
from services.launch.https import trusting
from services.membership.redis_membership import RedisMembership
from tests.support.kernels import share_kernels
from tests.support.scrape import Scrape, scrape

ROOT = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
QUIET_TIMEOUT_S = 20.0  # a lease that nobody released lives for 5 s; a killed worker is back in about 6 s
REQUEST_TIMEOUT_S = 300.0
STORE_TIMEOUT_S = 10.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    prefill: int
    decode: int
    split: str  # route_split of the gateway
    blocks: int  # KV blocks per worker
    transports: str = "nixl,grpc"  # of KV, of all workers
    drain_grace_s: float = 10.0  # of all workers
    redis: str = ""  # URL; without one `up` starts a Valkey
    locked: bool = False  # mutual TLS between its parts, and https
    quantization: str = "auto"  # of the weights
    compiler: bool = True  # False: there is none, and no kernels were built before


class RunningCluster:
    """One `diptych up` with a DIPTYCH_HOME of its own. One compute thread per worker."""

    def __init__(self, spec: ClusterSpec, model: Path, home: Path) -> None:
        self.spec = spec
        self.home = home
        arguments = ["up", "--port", "0", "--prefill", str(spec.prefill), "--decode", str(spec.decode)]
        arguments += ["--blocks", str(spec.blocks), "--threads", "1", "--model", str(model)]
        arguments += ["--quantization", spec.quantization]
        arguments += ["--redis", spec.redis] if spec.redis else []
        command = [sys.executable, "-m", "services.launch.cli", *arguments]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),  # this checkout, whichever one is installed
            "DIPTYCH_HOME": str(home),
            "DIPTYCH_GATEWAY__ROUTE_SPLIT": spec.split,
            "DIPTYCH_WORKER__TRANSPORTS": spec.transports,
            "DIPTYCH_WORKER__DRAIN_GRACE_S": str(spec.drain_grace_s),
        }
        home.mkdir(parents=True)
        if spec.compiler:
            share_kernels(home)
        else:
            environment["CXX"] = "no-such-compiler"
        self.authority = create_authority(home / "ca") if spec.locked else None
        if self.authority:
            environment |= _certificates(self.authority.issue("node", ["127.0.0.1"], days=30))
        with (home / "stdout").open("wb") as stdout, (home / "stderr").open("wb") as stderr:
            # A killed test run must not leave a cluster behind.
            self.process = subprocess.Popen(
                dying_with_parent(command, signal.SIGTERM), env=environment, stdout=stdout, stderr=stderr
            )
        try:
            self.url = self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        self.state = msgspec.json.decode((home / "run/cluster.json").read_bytes(), type=ClusterState)

    def http(self) -> httpx.AsyncClient:
        verify = trusting(self.authority.folder / "ca.crt" if self.authority else None)
        return httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=REQUEST_TIMEOUT_S, verify=verify)

    @property
    def said(self) -> str:
        """What `up` has told its user so far, except for the ready line."""
        return (self.home / "stderr").read_text()

    async def until_said(self, line: str, after: int = 0, timeout_s: float = 60.0) -> None:
        """Wait until `up` says `line`; `after` is the length of what it had said before."""
        await until(lambda: line in self.said[after:], timeout_s, lambda: f"`up` said only:\n{self.said}")

    def processes(self) -> dict[str, psutil.Process]:
        """All below `up`: "gateway", "gateway templates", "valkey", "decode-0", "decode-0 engine"."""
        named: dict[str, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended since
                named[_process_name(process)] = process
        return named

    async def reports(self) -> list[WorkerReport]:
        """On a busy machine the store may need longer than its clients wait: some of them failed once."""
        membership = RedisMembership(self.state.redis_url, timeout_s=STORE_TIMEOUT_S)
        try:
            return await membership.workers()
        finally:
            await membership.close()

    async def gateway_metrics(self) -> Scrape:
        async with self.http() as http:
            return await scrape(http, "/metrics")

    async def worker_metrics(self) -> dict[str, Scrape]:
        async with self.http() as http:
            return {r.worker_id: await scrape(http, r.metrics_url) for r in await self.reports()}

    async def until_computing(self, worker: str, kind: str) -> None:
        """Wait for a worker's next step with tokens of `kind`: "prefill" or "decode"."""

        async def computed() -> float:
            seen = (await self.worker_metrics())[worker]
            return seen.value("diptych_worker_batch_tokens_sum", kind=kind)

        before = await computed()
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            while await computed() == before:
                await asyncio.sleep(POLL_S)

    async def await_quiet(self, timeout_s: float = QUIET_TIMEOUT_S) -> None:
        """Wait until nothing is left of any request, on any worker, and all workers are there.

        Blocks are then free or cached, no sequence runs or waits, no lease is open, and the gateway
        holds no request. Fails with the numbers.
        """
        deadline = time.monotonic() + timeout_s
        while remains := await self.remains():
            assert time.monotonic() < deadline, f"not quiet after {timeout_s:g} s: {'; '.join(remains)}"
            await asyncio.sleep(POLL_S)

    async def remains(self) -> list[str]:
        """What still has to go, in words."""
        try:
            gateway, workers = await self.gateway_metrics(), await self.worker_metrics()
        except (httpx.HTTPError, StoreUnavailable) as error:
            return [f"a part does not answer: {error!r}"]
        inflight = gateway.value("diptych_gateway_inflight")
        remains = [f"the gateway has {inflight:g} requests"] if inflight else []
        if len(workers) < self.spec.prefill + self.spec.decode:
            remains.append(f"only {sorted(workers)} are alive")
        return remains + [text for name, seen in workers.items() for text in _held(name, seen)]

    def stop(self) -> int:
        """SIGTERM, as a service manager does; the exit code. Fails if a process is left."""
        family = [psutil.Process(self.process.pid), *self.processes().values()] if self.alive else []
        if self.alive:
            self.process.terminate()
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        left = [process for process in family if runs(process)]
        assert not left, f"left behind: {left}"
        assert not (self.home / "run/cluster.json").exists(), "it still says that it runs"
        return code

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def _wait_until_ready(self) -> str:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self.alive:
            stdout = (self.home / "stdout").read_text()
            if stdout.startswith("ready ") and stdout.endswith("/v1\n"):
                return stdout.removeprefix("ready ").removesuffix("/v1\n")
            time.sleep(POLL_S)
        raise AssertionError(f"`diptych up` did not get ready:\n{self.said}")


def _certificates(node: Path) -> dict[str, str]:
    """The environment in which all parts of a cluster use one node's files."""
    cert, key, ca = (str(node / name) for name in ("tls.crt", "tls.key", "ca.crt"))
    return {
        "DIPTYCH_CLUSTER__CERT": cert,
        "DIPTYCH_CLUSTER__KEY": key,
        "DIPTYCH_CLUSTER__CA": ca,
        "DIPTYCH_GATEWAY__TLS_CERT": cert,
        "DIPTYCH_GATEWAY__TLS_KEY": key,
    }


async def until(condition: Callable[[], bool], timeout_s: float, otherwise: Callable[[], str]) -> None:
    """Wait for `condition`; fails with the words of `otherwise`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        await asyncio.sleep(POLL_S)


def runs(process: psutil.Process) -> bool:
    """An ended process that its parent has not collected yet does not run."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _held(worker: str, seen: Scrape) -> list[str]:
    held = {
        "running sequences": seen.value("diptych_worker_sequences", state="running"),
        "waiting sequences": seen.value("diptych_worker_sequences", state="waiting"),
        "used blocks": seen.value("diptych_worker_blocks", state="used"),
        "open leases": seen.value("diptych_worker_leases"),
    }
    return [f"{worker} has {count:g} {what}" for what, count in held.items() if count]


def _process_name(process: psutil.Process) -> str:
    """The part of the cluster that a process is, by its command line."""
    command = process.cmdline()
    if "--worker-id" in command:
        return command[command.index("--worker-id") + 1]
    if "services.engine.process" in command:
        parent = process.parent()
        return f"{_process_name(parent)} engine" if parent else "engine"
    for what in ("template", "grammar"):
        if f"services.gateway.text.{what}_process" in command:
            return f"gateway {what}s"
    known = {"gateway": "gateway" in command, "valkey": any("valkey-server" in part for part in command)}
    return next((name for name, matches in known.items() if matches), " ".join(command))
