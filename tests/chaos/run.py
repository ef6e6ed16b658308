"""A chaos run: the undisturbed answers first, then clients and faults together, then the reckoning."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.chaos.client import Patience, Reply, follow
from tests.chaos.faults import FAULTS, WELL_TIMEOUT_S, Fault, Striker, Ward
from tests.chaos.report import Findings, Report
from tests.chaos.ties import TieJudge
from tests.chaos.workload import Ask, draw_pool
from tests.support.cluster import ClusterSpec, RunningCluster

TWO_AND_TWO = ClusterSpec(prefill=2, decode=2, split="always", blocks=400)
UNDISTURBED_AT_ONCE = 4
# The load goes on for so long after the last fault has begun: workers come back under it.
RECOVERY_S = 8.0
UNSEEDED_CHECKED_MAX = 40
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


async def run_chaos(cluster: RunningCluster, model: Path, plan: ChaosPlan) -> Report:
    """The whole run on a cluster that is ready. Its faults are over when it returns."""
    findings = Findings()
    rng = random.Random(plan.seed)
    pool = draw_pool(plan.pool, rng)
    async with cluster.http() as http:
        plan.say(f"undisturbed answers to {len(pool)} requests")
        undisturbed = await _undisturbed(http, pool)
        plan.say(f"{plan.seconds:g} s of load and faults")
        struck = await _disturb(cluster, http, plan, pool, findings, rng)
        plan.say("comparing answers")
        findings.held = await _what_is_held(cluster)
        await _compare(findings, undisturbed, TieJudge(model), http)
        retries = (await cluster.gateway_metrics()).by_label("diptych_gateway_retries_total", "error")
    return findings.report(plan.seconds, plan.seed, struck, retries)


async def _undisturbed(http: httpx.AsyncClient, pool: list[Ask]) -> dict[int, Reply]:
    """By number; unseeded requests have no answer of their own."""
    turns = asyncio.Semaphore(UNDISTURBED_AT_ONCE)

    async def ask_one(ask: Ask) -> Reply:
        async with turns:
            return await follow(http, ask)

    replies = await asyncio.gather(*(ask_one(ask) for ask in pool if ask.kind != "unseeded"))
    for reply in replies:
        assert reply.end == "completed", f"undisturbed request {reply.ask.number}: {reply.problem}"
        assert not reply.resumed, f"undisturbed request {reply.ask.number} needed several attempts"
    return {reply.ask.number: reply for reply in replies}


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


async def _compare(
    findings: Findings, undisturbed: dict[int, Reply], judge: TieJudge, http: httpx.AsyncClient
) -> None:
    """Each answer with the undisturbed one; the answers to drawn seeds that were resumed are asked again."""
    completed = [reply for reply in findings.replies if reply.end == "completed"]
    for reply in completed:
        if reply.ask.kind != "unseeded":
            await _compare_one(findings, reply, undisturbed[reply.ask.number], judge)
    resumed = [reply for reply in completed if reply.ask.kind == "unseeded" and reply.resumed]
    for reply in resumed[:UNSEEDED_CHECKED_MAX]:
        again = await follow(http, reply.ask.with_seed(reply.timings["seed"]))
        findings.unseeded_checked += 1
        await _compare_one(findings, reply, again, judge)


async def _compare_one(findings: Findings, reply: Reply, right: Reply, judge: TieJudge) -> None:
    if found := difference(reply, right):
        if await judge.parts_at_tie(right.ask, reply.token_ids, right.token_ids):
            findings.ties += 1
        else:
            attempts = reply.timings.get("attempts")
            findings.different.append(f"request {reply.ask.number} ({attempts} attempts): {found}")


def difference(reply: Reply, right: Reply) -> str:
    if reply.token_ids != right.token_ids:
        return f"its tokens are {reply.token_ids}, undisturbed {right.token_ids}"
    if (reply.text, reply.finish) != (right.text, right.finish):
        return f"its text is {reply.text!r} ({reply.finish}), undisturbed {right.text!r} ({right.finish})"
    for what in ("prompt_tokens", "completion_tokens", "total_tokens"):
        if reply.usage[what] != right.usage[what]:
            return f"its {what} are {reply.usage[what]}, undisturbed {right.usage[what]}"
    return ""
