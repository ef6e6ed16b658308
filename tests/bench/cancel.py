"""How long a request that its client has left still holds KV blocks.

    python -m tests.bench.cancel --cancels 200

Production gateway and workers with the default model; the engines are processes of their own, all else
runs here, so that the moment of every event is known on one clock. Clients hang up at random moments,
one after the other, while a second request keeps the prefill worker busy in a third of the cases.
Prints, for each stage in which the client left, the time from its hanging up to the last block freed on
both workers: as it was, and without what was left of the engines' running steps.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from loadtest.summary import percentile
from services.core.clock import Clock, SystemClock
from services.core.worker_report import Role
from services.engine.handle import EngineHandle, Listener
from services.engine.messages import Report, Submit
from services.gateway.api.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.served_model import ServedModel
from services.gateway.workers.grpc_worker_client import GrpcWorkerClient
from services.history.memory_history import MemoryHistory
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from services.model.files import open_model
from services.model.pull import ensure_default_model
from services.worker.config import WorkerConfig
from services.worker.http import StatusServer
from services.worker.identity import identify
from services.worker.main import Surroundings, Worker
from tests.support.completions import MODEL
from tests.unit.gateway.in_memory_cluster import over_network

UNUSED = "redis://unused"  # index and membership are in memory
BLOCKS = 600
PROMPT_TOKENS = (40, 700)
LEAVE_AFTER_S = (0.02, 2.5)  # queued, prefilling, transferring and decoding
BUSY_SHARE = 0.35
ANSWER_TOKENS = 1000
TARGET_MS = 100.0
QUIET_S = 30.0
WORKERS: tuple[tuple[str, Role], ...] = (("prefill-0", "prefill"), ("decode-0", "decode"))


class WatchedEngine(EngineHandle):
    """Notes when its process told what. Sequences are named "request/attempt"."""

    def __init__(self, sequences_max: int, on_report: Callable[[Report], None], clock: Clock) -> None:
        super().__init__(sequences_max, self._see, clock)
        self._pass_on = on_report
        self.name = ""
        self.submitted: dict[str, float] = {}
        self.admitted: set[str] = set()
        self.sampled: set[str] = set()
        self.dropped: dict[str, float] = {}
        self.steps: deque[tuple[float, float]] = deque(maxlen=1000)  # begin and end

    def submit(self, submit: Submit, listener: Listener) -> None:
        super().submit(submit, listener)
        self.submitted[submit.seq_id] = time.monotonic()

    def _see(self, report: Report) -> None:
        now = time.monotonic()
        self.admitted.update(event.seq_id for event in report.admitted)
        self.sampled.update(token.seq_id for token in report.tokens)
        self.dropped.update(dict.fromkeys(report.dropped, now))
        if report.step:
            self.steps.append((now - report.step.seconds, now))
        self._pass_on(report)

    def step_end(self, at_s: float) -> float:
        """When the step that ran at that moment ended; that moment itself if none did."""
        return next((end for begin, end in reversed(self.steps) if begin <= at_s < end), at_s)


@dataclass(frozen=True, slots=True)
class Cancel:
    """One client that left, in milliseconds from its hanging up."""

    stage: str
    freed_ms: float
    after_steps_ms: float  # from the end of the steps that ran on its workers then


class NoStatusServer(StatusServer):
    """Its thread would disturb the measurement."""

    def __init__(self, *_: object) -> None:
        self.port = 0

    def close(self) -> None:
        pass


class Rig:
    """A prefill and a decode worker behind a gateway, all but the engines in this process."""

    def __init__(self) -> None:
        self.engines: list[WatchedEngine] = []
        self.url = ""

    @asynccontextmanager
    async def running(self, model: Path) -> AsyncIterator["Rig"]:
        clock = SystemClock()
        index, membership = MemoryPrefixIndex(clock, ttl_s=60), MemoryMembership(clock)
        stop, serving = asyncio.Event(), []
        for name, role in WORKERS:
            config = WorkerConfig(
                role=role, worker_id=name, model=str(model), redis=UNUSED, blocks=BLOCKS, threads=1
            )
            surroundings = Surroundings(
                index,
                membership,
                new_engine=partial(self._new_engine, role),
                new_status_server=NoStatusServer,
            )
            worker = Worker(config, identify(config), surroundings)
            serving.append(asyncio.create_task(worker.serve(stop)))
        client = GrpcWorkerClient()
        gateway = Gateway(
            GatewayConfig(route_split="always"),
            ServedModel.of(open_model(model)),
            *(membership, index, client, MemoryHistory(clock, ttl_s=3600), clock),
        )
        following = asyncio.create_task(gateway.view.follow(0.1))
        while len(gateway.view.reports) < len(WORKERS):
            await asyncio.sleep(0.05)
        async with over_network(build_app(gateway)) as http:
            self.url = str(http.base_url)
            yield self
        following.cancel()
        await client.close()
        stop.set()
        await asyncio.gather(*serving)

    def _new_engine(
        self, role: Role, sequences_max: int, on_report: Callable[[Report], None], clock: Clock
    ) -> WatchedEngine:
        engine = WatchedEngine(sequences_max, on_report, clock)
        engine.name = role
        self.engines.append(engine)
        return engine

    async def cancel_one(self, rng: random.Random) -> Cancel | None:
        """None if it held nothing when its client left."""
        busy = await self._keep_busy(rng) if rng.random() < BUSY_SHARE else None
        before = {seq_id for engine in self.engines for seq_id in engine.submitted}
        asking = asyncio.create_task(self._ask(rng))
        await asyncio.sleep(rng.uniform(*LEAVE_AFTER_S))
        holding = [(e, s) for e in self.engines for s in e.submitted.keys() - before - e.dropped.keys()]
        stage = self._stage(holding)
        left_s = time.monotonic()
        await _hang_up(asking)
        cancel = await self._freed(holding, stage, left_s) if holding else None
        if busy is not None:
            await _hang_up(busy)
        async with asyncio.timeout(QUIET_S):
            while any(engine.sequences for engine in self.engines):
                await asyncio.sleep(0.01)
        return cancel

    async def _freed(self, holding: list[tuple[WatchedEngine, str]], stage: str, left_s: float) -> Cancel:
        async with asyncio.timeout(QUIET_S):
            while any(seq_id not in engine.dropped for engine, seq_id in holding):
                await asyncio.sleep(0.001)
        after = [engine.dropped[seq_id] - engine.step_end(left_s) for engine, seq_id in holding]
        freed_s = max(engine.dropped[seq_id] for engine, seq_id in holding)
        return Cancel(stage, (freed_s - left_s) * 1e3, max(after) * 1e3)

    async def _keep_busy(self, rng: random.Random) -> "asyncio.Task[None]":
        """A long prompt before ours, which begins to be computed."""
        prefill = next(engine for engine in self.engines if engine.name == "prefill")
        known = len(prefill.admitted)
        asking = asyncio.create_task(self._ask(rng, PROMPT_TOKENS[1]))
        while len(prefill.admitted) == known:
            await asyncio.sleep(0.005)
        return asking

    async def _ask(self, rng: random.Random, tokens: int = 0) -> None:
        prompt = [rng.randrange(100, 40_000) for _ in range(tokens or rng.randint(*PROMPT_TOKENS))]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            await http.post("/v1/completions", json=body | {"stream": rng.random() < 0.5})

    def _stage(self, holding: list[tuple[WatchedEngine, str]]) -> str:
        roles = {engine.name: (engine, seq_id) for engine, seq_id in holding}
        if "decode" in roles and roles["decode"][1] in roles["decode"][0].sampled:
            return "decoding"
        if "prefill" not in roles:
            return "transferring" if holding else "nothing"
        engine, seq_id = roles["prefill"]
        if seq_id in engine.sampled:
            return "transferring"
        return "prefilling" if seq_id in engine.admitted else "queued"


async def _hang_up(asking: "asyncio.Task[None]") -> None:
    asking.cancel()
    await asyncio.wait([asking])


async def measure(cancels: int, seed: int) -> list[Cancel]:
    rng = random.Random(seed)
    async with Rig().running(ensure_default_model()) as rig:
        found = [await rig.cancel_one(rng) for _ in range(cancels)]
    return [cancel for cancel in found if cancel is not None]


def table(cancels: list[Cancel]) -> str:
    stages: defaultdict[str, list[Cancel]] = defaultdict(list)
    for cancel in cancels:
        stages[cancel.stage].append(cancel)
        stages["all"].append(cancel)
    lines = [
        "stage         cancels   from hanging up: p50, p99, max   without the running step: p50, p99, max"
    ]
    for stage, some in sorted(stages.items(), key=lambda item: (item[0] == "all", item[0])):
        raw, net = sorted(c.freed_ms for c in some), sorted(c.after_steps_ms for c in some)
        lines.append(f"{stage:13} {len(some):7}   {_percentiles(raw):>28}   {_percentiles(net):>37}")
    return "\n".join(lines)


def _percentiles(ordered: list[float]) -> str:
    return ", ".join(f"{percentile(ordered, p):.1f}" for p in (50, 99, 100)) + " ms"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cancel", description=__doc__.split("\n")[0])
    parser.add_argument("--cancels", type=int, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    cancels = asyncio.run(measure(given.cancels, given.seed))
    print(table(cancels))
    slow = sum(cancel.after_steps_ms > TARGET_MS for cancel in cancels)
    print(f"{slow} of {len(cancels)} above the target of {TARGET_MS:.0f} ms after the running step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
