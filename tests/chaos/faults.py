"""Faults that strike a running cluster at random: which there are, when one may strike, and the blow.

    kill    SIGKILL
    pause   SIGSTOP, and after a random time SIGCONT
    freeze  SIGSTOP, and after a random time SIGKILL
    drain   SIGTERM, which lets a worker finish or hand over what it has

A fault hits a worker's I/O process, its engine process or Valkey. It is held back while it would take
the last decode worker that is well: without one nobody could answer. Prefill workers may all be gone.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import httpx
import psutil

from tests.support.cluster import RunningCluster

Blow = Literal["kill", "pause", "freeze", "drain"]
STOPPED_S = (0.2, 8.0)  # shorter and longer than what the cluster takes for a failure
SETTLED_S = 1.0  # a worker has to look well for so long before another one may be struck
WELL_TIMEOUT_S = 90.0  # the supervisor waits up to 30 s before it restarts a part that dies often
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Fault:
    part: Literal["prefill", "prefill engine", "decode", "decode engine", "valkey"]
    blow: Blow

    def __str__(self) -> str:
        return f"{self.part} {self.blow}"

    @property
    def role(self) -> str:
        return self.part.split()[0]


FAULTS = (
    *(Fault(part, blow) for part in ("prefill", "decode") for blow in ("kill", "pause", "freeze", "drain")),
    *(
        Fault(part, blow)
        for part in ("prefill engine", "decode engine")
        for blow in ("kill", "pause", "freeze")
    ),
    *(Fault("valkey", blow) for blow in ("kill", "pause", "freeze")),
)


class Ward:
    """Which workers are well: seen by the gateway as ready in their present life, and not struck.

    One that was struck is well again when the gateway has listed it for SETTLED_S as ready and its own
    health check says so, in a new life if it had to die; and only once the gateway has heard of it again
    since: one that stood still may be another incarnation than the gateway knows.
    """

    def __init__(self, cluster: RunningCluster, http: httpx.AsyncClient) -> None:
        self._cluster, self._http = cluster, http
        spec = cluster.spec
        self.workers = [f"prefill-{n}" for n in range(spec.prefill)]
        self.workers += [f"decode-{n}" for n in range(spec.decode)]
        self._struck: set[str] = set()  # the blow has not ended yet
        self._dead_epochs: dict[str, int] = {}  # the last life of a worker that was to die
        self._well_since: dict[str, float] = {}
        self._epochs: dict[str, int] = {}
        self._beats: dict[str, int] = {}  # of the reports that the gateway has
        self._beats_when_struck: dict[str, int] = {}

    @property
    def well(self) -> set[str]:
        since = time.monotonic() - SETTLED_S
        return {worker for worker, at in self._well_since.items() if at <= since}

    @property
    def all_well(self) -> bool:
        return len(self.well) == len(self.workers)

    def struck(self, worker: str, dies: bool) -> None:
        self._struck.add(worker)
        self._well_since.pop(worker, None)
        if dies and worker in self._epochs:
            self._dead_epochs[worker] = self._epochs[worker]

    def blow_ended(self, worker: str) -> None:
        self._struck.discard(worker)
        self._beats_when_struck[worker] = self._beats.get(worker, 0)

    async def watch(self) -> None:
        """Look at the cluster for ever."""
        while True:
            await self._look()
            await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        well = await self._seen_well()
        now = time.monotonic()
        for worker in self.workers:
            if worker not in well or worker in self._struck:
                self._well_since.pop(worker, None)
            else:
                self._well_since.setdefault(worker, now)

    async def _seen_well(self) -> set[str]:
        try:
            listed = (await self._http.get("/v1/cluster")).raise_for_status().json()
        except httpx.HTTPError:
            return set()
        candidates = {report["worker_id"]: report for report in listed if report["state"] == "ready"}
        self._beats |= {worker: report["beat"] for worker, report in candidates.items()}
        heard = [w for w in candidates if self._beats[w] != self._beats_when_struck.get(w)]
        alive = [w for w in heard if candidates[w]["epoch"] != self._dead_epochs.get(w)]
        checks = await asyncio.gather(*(self._says_ready(candidates[worker]) for worker in alive))
        self._epochs |= {worker: candidates[worker]["epoch"] for worker in alive}
        return {worker for worker, ready in zip(alive, checks, strict=True) if ready}

    async def _says_ready(self, report: dict) -> bool:
        url = report["metrics_url"].replace("/metrics", "/health/ready")
        try:
            return (await self._http.get(url, timeout=1.0)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


class Striker:
    """Strikes until it is cancelled; `struck` counts the faults by name."""

    def __init__(
        self,
        cluster: RunningCluster,
        ward: Ward,
        rng: random.Random,
        every_s: float,
        kinds: tuple[Fault, ...],
    ) -> None:
        self._cluster, self._ward, self._rng = cluster, ward, rng
        self._every_s, self._kinds = every_s, kinds
        self._running: set[asyncio.Task[None]] = set()
        self._valkey_busy = False
        self.struck: Counter[str] = Counter()
        self.log: list[str] = []  # what happened when, to read a failure by
        self.started_s = time.monotonic()

    async def strike_until(self, end_s: float) -> None:
        """Faults at random until then, the least frequent kinds first; then wait for the last to end."""
        while time.monotonic() < end_s:
            await asyncio.sleep(self._every_s * self._rng.uniform(0.5, 1.5))
            if time.monotonic() < end_s and (chosen := self._choose()):
                task = asyncio.create_task(self._strike(*chosen))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
        await asyncio.gather(*self._running)

    def _choose(self) -> tuple[Fault, str] | None:
        """A fault that may strike now, and the worker it hits."""
        possible = [(fault, victim) for fault in self._kinds for victim in self._victims(fault)]
        if not possible:
            return None
        least = min(self.struck[str(fault)] for fault, _ in possible)
        return self._rng.choice([pair for pair in possible if self.struck[str(pair[0])] <= least + 1])

    def _victims(self, fault: Fault) -> list[str]:
        if fault.role == "valkey":
            return [] if self._valkey_busy else ["valkey"]
        well = sorted(worker for worker in self._ward.well if worker.startswith(fault.role))
        spare = 1 if fault.role == "decode" else 0
        return well if len(well) > spare else []

    async def _strike(self, fault: Fault, victim: str) -> None:
        name = victim + (" engine" if fault.part.endswith("engine") else "")
        process = self._cluster.processes().get(name)
        if process is None:  # it is just being restarted
            return
        self.struck[str(fault)] += 1
        self._note(f"{fault.blow} {name}")
        self._begin(victim, dies=fault.blow != "pause")
        try:
            await self._blow(process, fault.blow)
        except psutil.NoSuchProcess:
            self._note(f"{name} was gone already")  # somebody took it for hung, and ended it
        finally:
            self._end(victim)

    async def _blow(self, process: psutil.Process, blow: Blow) -> None:
        if blow in ("pause", "freeze"):
            process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(self._rng.uniform(*STOPPED_S))
            finally:
                process.send_signal(signal.SIGCONT if blow == "pause" else signal.SIGKILL)
                self._note(f"{'continued' if blow == 'pause' else 'killed'} {process.pid}")
        else:
            process.send_signal(signal.SIGKILL if blow == "kill" else signal.SIGTERM)

    def _begin(self, victim: str, dies: bool) -> None:
        if victim == "valkey":
            self._valkey_busy = True
        else:
            self._ward.struck(victim, dies)

    def _end(self, victim: str) -> None:
        if victim == "valkey":
            self._valkey_busy = False
        else:
            self._ward.blow_ended(victim)

    def _note(self, text: str) -> None:
        self.log.append(f"{time.monotonic() - self.started_s:7.2f} s  {text}")
