"""A chaos run: the undisturbed answers first, then clients and faults together, then the reckoning."""

import asyncio
import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import httpx

from tests.chaos.client import Patience, follow
from tests.chaos.comparison import ask_all, compare_all, prompt_difference
from tests.chaos.faults import FAULTS, WELL_TIMEOUT_S, Fault, Striker, Ward
from tests.chaos.reply import Reply
from tests.chaos.report import Findings, Report
from tests.chaos.workload import Ask, draw_pool
from tests.support.cluster import ClusterSpec, RunningCluster

# With 8-bit weights a token's numbers depend on its context alone: answers are compared to the last bit.
TWO_AND_TWO = ClusterSpec(prefill=2, decode=2, split="always", blocks=400, quantization="int8")
# The load goes on for so long after the last fault has begun: workers come back under it.
RECOVERY_S = 8.0
FRESH_SHARE = 0.5  # of requests that find nothing in the prefix cache
QUIET_S = 60.0


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    seconds: float
    seed: int
    clients: int = 6
    fault_every_s: float = 4.0
    pool: int = 30  # different requests
    hang_up_share: float = 0.12
    faults: tuple[Fault, ...] = FAULTS
    say: Callable[[str], None] = print  # progress


async def run_chaos(cluster: RunningCluster, plan: ChaosPlan) -> Report:
    """The whole run on a cluster that is ready. Its faults are over when it returns."""
    findings = Findings(plan.seconds, plan.seed, cluster.spec.transports)
    rng = random.Random(plan.seed)
    pool = draw_pool(plan.pool, rng)
    async with cluster.http() as http:
        plan.say(f"undisturbed answers to {len(pool)} requests")
        undisturbed = await _undisturbed(http, pool)
        plan.say(f"{plan.seconds:g} s of load and faults")
        findings.faults = await _disturb(cluster, http, plan, pool, findings, rng)
        plan.say("comparing answers")
        findings.held = await _what_is_held(cluster)
        await compare_all(findings, undisturbed, http)
        findings.retries = (await cluster.gateway_metrics()).by_label(
            "diptych_gateway_retries_total", "error"
        )
    findings.over_grpc = _over_grpc(cluster)
    return findings.report()


async def _undisturbed(http: httpx.AsyncClient, pool: list[Ask]) -> dict[int, Reply]:
    """By number; unseeded requests have no answer of their own."""
    asks = [ask for ask in pool if ask.kind != "unseeded"]
    replies = {reply.ask.number: reply for reply in await ask_all(http, asks)}
    for number, reply in replies.items():
        assert reply.end == "completed", f"undisturbed request {number}: {reply.problem}"
        assert not reply.resumed, f"undisturbed request {number} needed several attempts"
    for single in await ask_all(http, [ask.for_one_token() for ask in asks if ask.choices > 1]):
        several = replies[single.ask.number]
        assert single.end == "completed", f"one token of request {single.ask.number}: {single.problem}"
        assert not (found := prompt_difference(several, single)), f"request {single.ask.number}: {found}"
    return replies


async def _disturb(
    cluster: RunningCluster,
    http: httpx.AsyncClient,
    plan: ChaosPlan,
    pool: list[Ask],
    findings: Findings,
    rng: random.Random,
) -> Counter[str]:
    """Clients and faults at once, until the time is over and the last answer is there; the faults."""
    ward = Ward(cluster, http)
    striker = Striker(cluster, ward, random.Random(rng.random()), plan.fault_every_s, plan.faults)
    findings.started_s = striker.started_s
    watching = asyncio.create_task(ward.watch())
    end_s = time.monotonic() + plan.seconds
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(striker.strike_until(end_s - RECOVERY_S))
            numbers = itertools.count()
            for _ in range(plan.clients):
                client = random.Random(rng.random())
                tasks.create_task(_client(http, plan, pool, findings, end_s, client, numbers))
        plan.say("waiting until every worker is well again")
        await _until_all_well(ward)
    finally:
        watching.cancel()
        (cluster.home / "faults.log").write_text("\n".join(striker.log))
    return striker.struck


def _over_grpc(cluster: RunningCluster) -> dict[str, int]:
    """How often the workers' logs say that KV does not travel over NIXL although it might, by reason."""
    logs = "".join(log.read_text(errors="replace") for log in (cluster.home / "logs").glob("*.log"))
    return dict(Counter(re.findall(r"travels over (gRPC.*)", logs)))


async def _client(
    http: httpx.AsyncClient,
    plan: ChaosPlan,
    pool: list[Ask],
    findings: Findings,
    end_s: float,
    rng: random.Random,
    numbers: Iterable[int],
) -> None:
    for number in numbers:
        if time.monotonic() >= end_s:
            return
        ask = rng.choice(pool)
        fresh = rng.random() < FRESH_SHARE
        patience = Patience.draw(rng, plan.hang_up_share)
        reply = await follow(http, ask.with_salt(f"fresh {number}") if fresh else ask, patience)
        findings.replies.append(reply)


async def _until_all_well(ward: Ward) -> None:
    """What is left of the faults is not the leftovers of requests: wait for every worker first."""
    deadline = time.monotonic() + WELL_TIMEOUT_S
    while not ward.all_well:
        assert time.monotonic() < deadline, f"only {sorted(ward.well)} are well again"
        await asyncio.sleep(0.2)


async def _what_is_held(cluster: RunningCluster) -> list[str]:
    """What is still held QUIET_S after the last answer; empty as soon as nothing is."""
    deadline = time.monotonic() + QUIET_S
    while (held := await cluster.remains()) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return held
