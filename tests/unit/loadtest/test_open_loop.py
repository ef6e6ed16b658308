"""Arrivals at a given rate, sent at their times whatever the server does."""

import asyncio
import itertools
import random
import time
from statistics import fmean, pstdev

import httpx
import pytest

from loadtest.open_loop import Arrival, poisson, run
from loadtest.workload import Call


def new_call(rng: random.Random) -> Call:
    return Call("/v1/completions", {"prompt": rng.random(), "max_tokens": 2})


def test_arrivals_are_a_poisson_process_of_the_rate_that_was_asked_for() -> None:
    times = [arrival.at_s for arrival in poisson(random.Random(1), 20.0, 500.0, new_call)]
    assert len(times) == pytest.approx(10_000, rel=0.03)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 500
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.05, rel=0.05)
    assert pstdev(gaps) == pytest.approx(0.05, rel=0.05), "exponential: as wide as their mean"


def test_the_same_seed_gives_the_same_arrivals() -> None:
    one, other = ([*poisson(random.Random(3), 5.0, 10.0, new_call)] for _ in range(2))
    assert one == other


async def test_nobody_waits_for_another_s_answer_and_outcomes_keep_their_order() -> None:
    came: list[float] = []
    all_came = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        came.append(time.perf_counter())
        if len(came) == 3:
            all_came.set()
        await all_came.wait()  # as nobody would be answered if clients took turns
        return httpx.Response(429 if b'"prompt":1' in request.content else 503)

    calls = [Call("/v1/completions", {"prompt": n, "max_tokens": 1}) for n in range(3)]
    arrivals = [Arrival(0.02 * n, call) for n, call in enumerate(calls)]
    async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(answer)) as http:
        async with asyncio.timeout(5):
            outcomes = await run(http, arrivals)
    assert [outcome.status for outcome in outcomes] == [503, 429, 503]
    assert came[2] - came[0] >= 0.03
