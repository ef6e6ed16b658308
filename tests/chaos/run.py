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
    async with cluster.http() as http:
        return await _Run(cluster, plan, http, TieJudge(model)).report()


class _Run:
    def __init__(
        self, cluster: RunningCluster, plan: ChaosPlan, http: httpx.AsyncClient, judge: TieJudge
    ) -> None:
        self._cluster, self._plan, self._http, self._judge = cluster, plan, http, judge
        self._rng = random.Random(plan.seed)
        self._pool = draw_pool(plan.pool, self._rng)
        self._findings = Findings()

    async def report(self) -> Report:
        plan, findings = self._plan, self._findings
        plan.say(f"undisturbed answers to {len(self._pool)} requests")
        undisturbed = await self._undisturbed()
        plan.say(f"{plan.seconds:g} s of load and faults")
        struck = await self._disturb()
        plan.say("comparing answers")
        findings.held = await _what_is_held(self._cluster)
        await self._compare(undisturbed)
        retries = (await self._cluster.gateway_metrics()).by_label("diptych_gateway_retries_total", "error")
        counts = {error: int(count) for error, count in retries.items()}
        return findings.report(plan.seconds, plan.seed, struck, counts)

    async def _undisturbed(self) -> dict[int, Reply]:
        """By number; unseeded requests have no answer of their own."""
        turns = asyncio.Semaphore(UNDISTURBED_AT_ONCE)

        async def ask_one(ask: Ask) -> Reply:
            async with turns:
                return await follow(self._http, ask)

        replies = await asyncio.gather(*(ask_one(ask) for ask in self._pool if ask.kind != "unseeded"))
        for reply in replies:
            assert reply.end == "completed", f"undisturbed request {reply.ask.number}: {reply.problem}"
            assert not reply.resumed, f"undisturbed request {reply.ask.number} needed several attempts"
        return {reply.ask.number: reply for reply in replies}

    async def _disturb(self) -> Counter[str]:
        """Clients and faults at once, until the time is over and the last answer is there; the faults."""
        plan, ward = self._plan, Ward(self._cluster, self._http)
        faults = random.Random(self._rng.random())
        striker = Striker(self._cluster, ward, faults, plan.fault_every_s, plan.faults)
        self._findings.started_s = striker.started_s
        watching = asyncio.create_task(ward.watch())
        end_s = time.monotonic() + plan.seconds
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(striker.strike_until(end_s - RECOVERY_S))
                numbers = itertools.count()
                for _ in range(plan.clients):
                    tasks.create_task(self._client(random.Random(self._rng.random()), end_s, numbers))
            plan.say("waiting until every worker is well again")
            await _until_all_well(ward)
        finally:
            watching.cancel()
            (self._cluster.home / "faults.log").write_text("\n".join(striker.log))
        return striker.struck

    async def _client(self, rng: random.Random, end_s: float, numbers: Iterable[int]) -> None:
        """Ask one request after the other until `end_s`."""
        for number in numbers:
            if time.monotonic() >= end_s:
                return
            ask = rng.choice(self._pool)
            fresh = rng.random() < FRESH_SHARE
            patience = Patience.draw(rng, self._plan.hang_up_share)
            reply = await follow(self._http, ask.with_salt(f"fresh {number}") if fresh else ask, patience)
            self._findings.replies.append(reply)

    async def _compare(self, undisturbed: dict[int, Reply]) -> None:
        """Each answer with the undisturbed one; those to drawn seeds that were resumed are asked again."""
        completed = [reply for reply in self._findings.replies if reply.end == "completed"]
        for reply in completed:
            if reply.ask.kind != "unseeded":
                await self._compare_one(reply, undisturbed[reply.ask.number])
        resumed = [reply for reply in completed if reply.ask.kind == "unseeded" and reply.resumed]
        for reply in resumed[:UNSEEDED_CHECKED_MAX]:
            again = await follow(self._http, reply.ask.with_seed(reply.timings["seed"]))
            self._findings.unseeded_checked += 1
            await self._compare_one(reply, again)

    async def _compare_one(self, reply: Reply, right: Reply) -> None:
        if found := difference(reply, right):
            if await self._judge.parts_at_tie(right.ask, reply.token_ids, right.token_ids):
                self._findings.ties += 1
            else:
                attempts = reply.timings.get("attempts")
                self._findings.different.append(f"request {reply.ask.number} ({attempts} attempts): {found}")


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


def difference(reply: Reply, right: Reply) -> str:
    if reply.token_ids != right.token_ids:
        return f"its tokens are {reply.token_ids}, undisturbed {right.token_ids}"
    if (reply.text, reply.finish) != (right.text, right.finish):
        return f"its text is {reply.text!r} ({reply.finish}), undisturbed {right.text!r} ({right.finish})"
    for what in ("prompt_tokens", "completion_tokens", "total_tokens"):
        if reply.usage[what] != right.usage[what]:
            return f"its {what} are {reply.usage[what]}, undisturbed {right.usage[what]}"
    return ""
