"""Routing policies side by side on a real cluster: time to first token and hit rate of the same requests.

    python -m tests.bench.policies [--quick] [--no-fetch]

Two prefill and two decode workers with the default model, and one gateway for each policy on their Redis.
Prompts of a group have a long prefix in common, as with a system prompt, and a tail of their own; a worker's
cache holds a part of all prefixes. In each round every policy gets the same requests at the same (Poisson)
moments, one policy after the other, in another order each round, with an API key of its own: no policy finds
what another one has left. Clients do not wait for each other. Times are from sending a request to the
first event of its answer, as the client sees it; the 99th percentile is nearly a round's slowest.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import httpx

from loadtest.summary import percentile
from services.core.parent_death import dying_with_parent
from services.launch.cluster import claim_port
from services.launch.readiness import GatewayReadiness
from services.model.pull import ensure_default_model
from tests.support.cluster import ROOT, ClusterSpec, RunningCluster
from tests.support.completions import MODEL

POLICIES = ("cost", "round_robin", "random")
TOKEN_IDS = range(100, 40_000)
READY_TIMEOUT_S = 60.0
SETTLE_S = 1.0  # reports of an idle cluster are with every gateway


@dataclass(frozen=True, slots=True)
class Load:
    """`blocks` of each worker hold about two thirds of the groups' prefixes and what runs at once."""

    groups: int = 6
    prompts_each: int = 5
    prefix_tokens: int = 320
    tail_tokens: int = 24
    answer_tokens: int = 6
    per_second: float = 2.5
    blocks: int = 160
    rounds: int = 5


QUICK = Load(prompts_each=3, rounds=1)


@dataclass(frozen=True, slots=True)
class Ask:
    at_s: float
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Answered:
    first_token_ms: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one policy in one round."""

    mean_ms: float
    p99_ms: float
    hit_rate: float

    @classmethod
    def of(cls, answered: Sequence[Answered]) -> "Figures":
        times = sorted(one.first_token_ms for one in answered)
        tokens, cached = (
            sum(getattr(one, f"{name}_tokens") for one in answered) for name in ("prompt", "cached")
        )
        return cls(fmean(times), percentile(times, 99), cached / tokens)


def asks(load: Load, seed: int) -> list[Ask]:
    """A round's requests, in the order in which they come."""
    rng = random.Random(seed)
    prefixes = [rng.choices(TOKEN_IDS, k=load.prefix_tokens) for _ in range(load.groups)]
    order = [prefix for prefix in prefixes for _ in range(load.prompts_each)]
    rng.shuffle(order)
    at_s, found = 0.0, []
    for prefix in order:
        found.append(Ask(at_s, [*prefix, *rng.choices(TOKEN_IDS, k=load.tail_tokens)]))
        at_s += rng.expovariate(load.per_second)
    return found


class Door:
    """One policy's gateway, as a client that has a key for it."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def serve(self, round_asks: Sequence[Ask], key: str, load: Load) -> list[Answered]:
        started_s = time.perf_counter()

        async def later(ask: Ask) -> Answered:
            await asyncio.sleep(max(0.0, started_s + ask.at_s - time.perf_counter()))
            return await self.ask(ask.prompt, key, load.answer_tokens)

        return list(await asyncio.gather(*map(later, round_asks)))

    async def ask(self, prompt: list[int], key: str, max_tokens: int) -> Answered:
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {key}"}
        sent_s, first_s, last = time.perf_counter(), 0.0, ""
        async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            assert response.status_code == httpx.codes.OK, await response.aread()
            async for line in response.aiter_lines():
                first_s = first_s or time.perf_counter()
                last = line if line.startswith("data: {") else last
        usage = json.loads(last.removeprefix("data: "))["usage"]
        return Answered(
            (first_s - sent_s) * 1e3,
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
        )


@contextmanager
def gateway(cluster: RunningCluster, policy: str, fetch: bool, model: Path) -> Iterator[str]:
    """A gateway beside that of the cluster; its root."""
    port = claim_port("127.0.0.1", 0)
    flags = ["--port", str(port), "--policy", policy, "--model", str(model)]
    command = [sys.executable, "-m", "services.launch.cli", "gateway", *flags]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DIPTYCH_GATEWAY__REDIS": cluster.state.redis_url,
        **{f"DIPTYCH_CLUSTER__{name.upper()}": value for name, value in cluster.state.lock.items()},
        "DIPTYCH_GATEWAY__PREFIX_FETCH": str(fetch).lower(),
    }
    with (cluster.home / f"gateway-{policy}").open("wb") as log:
        process = subprocess.Popen(
            dying_with_parent(command, signal.SIGTERM), env=environment, stdout=log, stderr=log
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def measure(cluster: RunningCluster, load: Load, fetch: bool, model: Path) -> dict[str, list[Figures]]:
    """The figures of each policy, by round."""
    found: dict[str, list[Figures]] = {policy: [] for policy in POLICIES}
    workers = {report.worker_id for report in await cluster.reports()}
    async with AsyncExitStack() as stack:
        doors = {}
        for policy in POLICIES:
            root = stack.enter_context(gateway(cluster, policy, fetch, model))
            await until_knows(GatewayReadiness(root), workers)
            http = httpx.AsyncClient(base_url=root, trust_env=False, timeout=300)
            doors[policy] = Door(await stack.enter_async_context(http))
        for policy, door in doors.items():  # the first steps of a process are slower
            await door.serve(asks(QUICK, seed=1), f"{policy} warms up", load)
        for number in range(load.rounds):
            for policy in in_turn(POLICIES, number):
                await asyncio.sleep(SETTLE_S)
                answered = await doors[policy].serve(
                    asks(load, seed=100 + number), f"{policy} {number}", load
                )
                found[policy].append(Figures.of(answered))
                print(f"round {number + 1}  {line(policy, found[policy][-1:])}", flush=True)
    return found


async def until_knows(readiness: GatewayReadiness, workers: set[str]) -> None:
    async with asyncio.timeout(READY_TIMEOUT_S):
        while not (await readiness() and await readiness.knows(workers)):
            await asyncio.sleep(0.1)


def in_turn(policies: Sequence[str], number: int) -> list[str]:
    """Each round begins with another policy, so that none always comes first."""
    first = number % len(policies)
    return [*policies[first:], *policies[:first]]


def line(policy: str, rounds: Sequence[Figures]) -> str:
    mean, p99, hit_rate = (
        fmean(getattr(figures, name) for figures in rounds) for name in ("mean_ms", "p99_ms", "hit_rate")
    )
    return f"{policy:12} mean {mean:6.0f} ms  p99 {p99:6.0f} ms  hit rate {hit_rate:5.1%}"


def ratios(found: dict[str, list[Figures]], other: str) -> str:
    """`cost` against another policy: of each round's figures, their mean and spread."""

    def ratio(name: str) -> str:
        each = [
            getattr(ours, name) / getattr(theirs, name)
            for ours, theirs in zip(found["cost"], found[other], strict=True)
        ]
        return f"{fmean(each):.2f} ({min(each):.2f} to {max(each):.2f})"

    return f"cost / {other:12} mean {ratio('mean_ms')}  p99 {ratio('p99_ms')}  hit rate {ratio('hit_rate')}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.policies", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one small round")
    parser.add_argument(
        "--no-fetch", action="store_true", help="workers do not fetch prefixes from each other"
    )
    arguments = parser.parse_args()
    load = QUICK if arguments.quick else Load()
    model = ensure_default_model()
    with tempfile.TemporaryDirectory() as folder:
        spec = ClusterSpec(prefill=2, decode=2, split="auto", blocks=load.blocks)
        cluster = RunningCluster(spec, model, Path(folder) / "home")
        try:
            found = asyncio.run(measure(cluster, load, not arguments.no_fetch, model))
        finally:
            cluster.stop()
    print(f"\n{load}")
    for policy, rounds in found.items():
        print(line(policy, rounds))
    for other in POLICIES[1:]:
        print(ratios(found, other))


if __name__ == "__main__":
    main()
