"""What a cluster does with more requests than it can serve.

    python -m tests.bench.overload [--quick]

A real cluster of one prefill and one decode worker with the default model. First, clients that ask one
request after the other find how much it can do: that is the sustainable rate. Then requests come at random
moments at 0.5, 1, 2 and 3 times that rate, from five API keys, one of which sends five times as
many as each other, in three priority classes. Each wants its first token within the target.

Goodput counts requests that had their first token within the target and were then answered whole. Times
are those of whoever was let in. Both are printed beside what was refused (429) and what failed.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import httpx

from loadtest.call import Outcome, perform
from loadtest.open_loop import poisson, run
from loadtest.summary import percentile
from loadtest.workload import Call
from services.model.pull import ensure_default_model
from tests.support.cluster import ClusterSpec, RunningCluster
from tests.support.completions import MODEL
from tests.support.scrape import scrape

TARGET_S = 3.0  # to the first token
FACTORS = (0.5, 1.0, 2.0, 3.0)
PROMPT_TOKENS, ANSWER_TOKENS = (64, 128), (4, 12)
# What each API key sends, as shares.
KEYS = {"flood": 5, "key 1": 1, "key 2": 1, "key 3": 1, "key 4": 1}
PRIORITIES = {-1: 1, 0: 8, 1: 1}
CLIENTS = 32  # at once, to find what the cluster can do
WARM_UP_S = 10.0
SHED_SHARE = 0.1  # of its best goodput that a cluster may lose by being overloaded
BLOCKS = 2000


@dataclass(frozen=True, slots=True)
class Load:
    """The outcomes of one rate, with the calls they are of."""

    factor: float
    seconds: float
    calls: Sequence[Call]
    outcomes: Sequence[Outcome]

    def __add__(self, other: "Load") -> "Load":
        outcomes = (*self.outcomes, *other.outcomes)
        return Load(self.factor, self.seconds + other.seconds, (*self.calls, *other.calls), outcomes)

    @property
    def goodput(self) -> float:
        """Requests a second."""
        return sum(map(is_good, self.outcomes)) / self.seconds

    def goodput_by_key(self) -> dict[str, float]:
        """The same for each API key, of its requests with normal priority: keys share within a class."""
        good: Counter[str] = Counter()
        for call, outcome in zip(self.calls, self.outcomes, strict=True):
            if call.body["priority"] == 0:
                good[call.headers["Authorization"].removeprefix("Bearer ")] += is_good(outcome)
        return {key: good[key] / self.seconds for key in KEYS}

    def good_share_by_priority(self) -> dict[str, float]:
        """Which part of what was offered was good."""
        offered: Counter[int] = Counter(call.body["priority"] for call in self.calls)
        good: Counter[int] = Counter()
        for call, outcome in zip(self.calls, self.outcomes, strict=True):
            good[call.body["priority"]] += is_good(outcome)
        return {str(priority): good[priority] / offered[priority] for priority in sorted(offered)}


def is_good(outcome: Outcome) -> bool:
    in_time = outcome.first_token_s is not None and outcome.first_token_s <= TARGET_S
    return outcome.end == "completed" and in_time


def new_call(rng: random.Random) -> Call:
    key = rng.choices([*KEYS], [*KEYS.values()])[0]
    body = {
        "model": MODEL,
        "prompt": [rng.randrange(100, 40_000) for _ in range(rng.randint(*PROMPT_TOKENS))],
        "max_tokens": rng.randint(*ANSWER_TOKENS),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "priority": rng.choices([*PRIORITIES], [*PRIORITIES.values()])[0],
        "ttft_max_s": TARGET_S,
    }
    return Call("/v1/completions", body, headers={"Authorization": f"Bearer {key}"})


async def sustainable_per_s(http: httpx.AsyncClient, rng: random.Random, seconds: float) -> float:
    """Answers a second with always CLIENTS requests in the cluster, once it is warm."""
    ended_s: list[float] = []
    begun_s = time.perf_counter()

    async def ask_on() -> None:
        while time.perf_counter() - begun_s < WARM_UP_S + seconds:
            call = new_call(rng)
            call.body["ttft_max_s"] = 600.0
            outcome = await perform(http, call)
            assert outcome.end == "completed", outcome.problem
            ended_s.append(time.perf_counter() - begun_s)

    await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
    return sum(WARM_UP_S <= at_s < WARM_UP_S + seconds for at_s in ended_s) / seconds


async def loads(http: httpx.AsyncClient, per_s: float, seconds: float, seed: int) -> list[Load]:
    """Each rate twice, half of `seconds` at a time, up and down again: whatever else slows this machine for
    a while then slows all of them."""
    halves: defaultdict[float, list[Load]] = defaultdict(list)
    for turn, factor in enumerate([*FACTORS, *reversed(FACTORS)]):
        rng = random.Random(f"{seed} {turn}")
        arrivals = [*poisson(rng, per_s * factor, seconds / 2, new_call)]
        outcomes = await run(http, arrivals)
        halves[factor].append(Load(factor, seconds / 2, [arrival.call for arrival in arrivals], outcomes))
    return [first + second for first, second in halves.values()]


HEADER = (
    "load   offered/s   let in   429   5xx   other   goodput/s   TTFT p50     p99   goodput/s by key (normal)"
)


def row(load: Load) -> str:
    statuses = Counter(outcome.status for outcome in load.outcomes)
    failed = [outcome for outcome in load.outcomes if outcome.end != "completed" and outcome.status != 429]
    server_errors = sum(outcome.status >= 500 or outcome.status == 0 for outcome in failed)
    times = sorted(outcome.first_token_s for outcome in load.outcomes if outcome.first_token_s is not None)
    p50, p99 = (f"{percentile(times, p):6.2f} s" if times else "   none " for p in (50, 99))
    keys = load.goodput_by_key()
    return (
        f"{load.factor:3g} x {len(load.outcomes) / load.seconds:10.2f} {statuses[200]:8d} {statuses[429]:5d}"
        f" {server_errors:5d} {len(failed) - server_errors:7d} {load.goodput:11.2f}   {p50} {p99}"
        f"   {_named(keys)}"
    )


def verdict(found: Sequence[Load]) -> str:
    """What the last rate kept of the best goodput, and how it was shared at it."""
    best = max(load.goodput for load in found) or float("inf")
    last = found[-1]
    lines = [f"goodput at {last.factor:g} x: {last.goodput / best:.0%} of its peak (target: 90 %)"]
    keys = last.goodput_by_key()
    others = fmean(goodput for key, goodput in keys.items() if key != "flood")
    ratio = keys["flood"] / others if others else float("inf")
    lines.append(
        f"the key that sends {KEYS['flood']} times as much has {ratio:.2f} times the others' goodput"
    )
    shares = ", ".join(f"{priority} {share:.0%}" for priority, share in last.good_share_by_priority().items())
    lines.append(f"good part of what was offered at {last.factor:g} x, by priority: {shares}")
    waits = sorted(o.retry_after_s for o in last.outcomes if o.retry_after_s is not None)
    if waits:
        lines.append(
            f"Retry-After at {last.factor:g} x: median {percentile(waits, 50)} s, most {waits[-1]} s"
        )
    problems = Counter(o.problem for load in found for o in load.outcomes if o.problem and o.status != 429)
    lines += [f"{count:5d} failed: {problem}" for problem, count in problems.most_common(5)]
    return "\n".join(lines)


def _named(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


async def measure(url: str, quick: bool, seed: int) -> list[Load]:
    seconds = 16.0 if quick else 36.0
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=300.0, limits=limits, trust_env=False) as http:
        per_s = await sustainable_per_s(http, random.Random(seed), seconds)
        print(f"sustainable: {per_s:.2f} requests/s ({CLIENTS} clients at once)", flush=True)
        found = await loads(http, per_s, seconds, seed)
        print(HEADER, *map(row, found), sep="\n")
        reasons = (await scrape(http, "/metrics")).by_label("diptych_gateway_rejections_total", "reason")
        print("refused by reason:", ", ".join(f"{count:.0f} {reason}" for reason, count in reasons.items()))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.overload", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = ClusterSpec(prefill=1, decode=1, split="auto", blocks=BLOCKS)
        cluster = RunningCluster(spec, ensure_default_model(), Path(folder) / "home")
        try:
            found = asyncio.run(measure(cluster.url.removesuffix("/v1"), given.quick, given.seed))
        finally:
            cluster.stop()
    print(verdict(found))
    best = max(load.goodput for load in found)
    return 0 if found[-1].goodput >= (1 - SHED_SHARE) * best else 1


if __name__ == "__main__":
    sys.exit(main())
