"""Load that does not wait for answers: requests come at random moments, whatever the server does with them.

Clients that ask one request after the other slow down with the server, and so never overload it. Here
arrivals are a Poisson process of a given rate: as from very many clients who know nothing of each other.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx

from loadtest.call import Outcome, perform
from loadtest.workload import Call


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float  # from the load's begin
    call: Call


def poisson(
    rng: random.Random, per_s: float, seconds: float, new_call: Callable[[random.Random], Call]
) -> Iterator[Arrival]:
    """About `per_s` arrivals a second: gaps between them are independent and exponential."""
    at_s = rng.expovariate(per_s)
    while at_s < seconds:
        yield Arrival(at_s, new_call(rng))
        at_s += rng.expovariate(per_s)


async def run(http: httpx.AsyncClient, arrivals: Sequence[Arrival]) -> list[Outcome]:
    """Send each at its time; return when all have ended, in the order of `arrivals`."""
    begun_s = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        tasks = [clients.create_task(_send(http, arrival, begun_s)) for arrival in arrivals]
    return [task.result() for task in tasks]


async def _send(http: httpx.AsyncClient, arrival: Arrival, begun_s: float) -> Outcome:
    await asyncio.sleep(max(0.0, begun_s + arrival.at_s - time.perf_counter()))
    return await perform(http, arrival.call)
