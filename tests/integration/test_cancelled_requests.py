"""A client that goes takes its request with it, wherever that is: both workers let go of its blocks at
once, and what had not been computed yet never is.

How long that takes on a real model is measured by tests/bench/cancel.py.
"""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from services.core.sampling import SamplingParams
from services.engine.messages import Submit
from services.gateway.served_model import ServedModel
from tests.support.completions import MODEL
from tests.support.in_process_cluster import InProcessCluster, in_process_cluster, until

PROMPT = [n * 7919 % 40_000 + 100 for n in range(60)]
OTHER = [n * 104_729 % 40_000 + 100 for n in range(60)]
STEP_TOKENS = 8
TOKENS = 100
SOON_S = 1.0  # nothing but a few turns of the event loop; leases and timeouts take longer


@pytest.fixture
async def cluster(model: ServedModel) -> AsyncIterator[InProcessCluster]:
    async with in_process_cluster(model, prefill=1, decode=1, blocks=96, pull_wait_s=20.0) as cluster:
        yield cluster


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request: pytest.FixtureRequest) -> bool:
    return request.param


class Client:
    """One request on a connection of its own, which it can drop."""

    def __init__(self, cluster: InProcessCluster, prompt: list[int], stream: bool) -> None:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": stream}
        self.cluster = cluster
        self.asking = asyncio.create_task(self._ask(str(cluster.http.base_url), body))

    async def _ask(self, url: str, body: dict) -> httpx.Response:
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            return await http.post("/v1/completions", json=body)

    async def hang_up(self) -> None:
        """And wait until the gateway has no request left of it."""
        before = self._in_gateway()
        self.asking.cancel()
        await asyncio.wait([self.asking])
        await until(lambda: self._in_gateway() == before - 1)

    def _in_gateway(self) -> float:
        return self.cluster.gateway.metrics.inflight._value.get()


def computed(cluster: InProcessCluster, worker: str, kind: str) -> float:
    """Tokens computed by a worker's engine so far."""
    registry = cluster.workers[worker].metrics.registry
    return registry.get_sample_value("diptych_worker_batch_tokens_sum", {"kind": kind}) or 0.0


async def test_a_queued_prefill_never_runs(cluster: InProcessCluster, stream: bool) -> None:
    prefill = cluster.workers["p0"].engine
    prefill.steps_left = 3
    first = Client(cluster, PROMPT, stream=False)
    await until(lambda: prefill.paused)
    second = Client(cluster, OTHER, stream)
    await until(lambda: prefill.sequences == 2)
    await second.hang_up()
    await until(lambda: prefill.sequences == 1)
    prefill.resume()
    assert (await first.asking).status_code == 200
    assert computed(cluster, "p0", "prefill") == len(PROMPT)
    assert cluster.count("worker_leases_ended", how="failed") == 1
    await cluster.until_quiet(SOON_S)


async def test_a_prefill_that_still_waits_for_its_pull_never_runs(
    cluster: InProcessCluster, stream: bool
) -> None:
    cluster.link("d0", "p0").hold_up()
    client = Client(cluster, PROMPT, stream)
    await until(lambda: cluster.workers["p0"].server.leases.open_leases)
    await client.hang_up()
    await cluster.until_quiet(SOON_S)
    cluster.link("d0", "p0").let_go()
    await asyncio.sleep(0.1)
    assert computed(cluster, "p0", "prefill") == 0
    await cluster.until_quiet(SOON_S)


async def test_a_prefill_stops_after_the_running_step(cluster: InProcessCluster, stream: bool) -> None:
    prefill = cluster.workers["p0"].engine
    prefill.steps_left = 3
    client = Client(cluster, PROMPT, stream)
    await until(lambda: prefill.paused)
    await client.hang_up()
    await until(lambda: not prefill.sequences)
    prefill.resume()
    await cluster.until_quiet(SOON_S)
    assert computed(cluster, "p0", "prefill") == 3 * STEP_TOKENS
    assert computed(cluster, "d0", "decode") == 0


async def test_a_transfer_over_a_link_that_swallows_everything_does_not_delay_the_end(
    cluster: InProcessCluster, stream: bool
) -> None:
    prefill, decode = cluster.workers["p0"].engine, cluster.workers["d0"].engine
    prefill.steps_left = 3
    client = Client(cluster, PROMPT, stream)
    await until(lambda: decode.landed_tokens == 3 * STEP_TOKENS)
    cluster.link("d0", "p0").hold_up()
    await client.hang_up()
    prefill.resume()
    await cluster.until_quiet(SOON_S)
    cluster.link("d0", "p0").let_go()


async def test_kv_that_waits_for_a_reader_behind_a_dead_link_is_let_go_with_its_lease(
    cluster: InProcessCluster, stream: bool
) -> None:
    """The prefill has ended, so the gateway has no call to its worker left to cancel."""
    prefill, decode = cluster.workers["p0"].engine, cluster.workers["d0"].engine
    prefill.steps_left = 3
    client = Client(cluster, PROMPT, stream)
    await until(lambda: decode.landed_tokens == 3 * STEP_TOKENS)
    cluster.link("d0", "p0").hold_up()
    prefill.resume()
    await until(lambda: prefill.gauges.queued_prefill_tokens == 0)
    await client.hang_up()
    await until(lambda: not decode.sequences)
    await cluster.until_quiet(within_s=8)  # keepalive, and the lease's time to live
    cluster.link("d0", "p0").let_go()


async def test_decoding_stops_after_the_running_step(cluster: InProcessCluster, stream: bool) -> None:
    decode = cluster.workers["d0"].engine
    decode.steps_left = 10
    client = Client(cluster, PROMPT, stream)
    await until(lambda: decode.paused)
    await client.hang_up()
    await until(lambda: not decode.sequences)
    decode.resume()
    await cluster.until_quiet(SOON_S)
    assert computed(cluster, "d0", "decode") == 10


async def test_a_request_that_waits_for_room_is_never_computed(
    cluster: InProcessCluster, stream: bool
) -> None:
    decode = cluster.workers["d0"].engine
    reservation = Submit("another", "receive", [1] * 350, [], SamplingParams(max_tokens=1))
    decode.submit(reservation, lambda event: None)  # all blocks but a few
    client = Client(cluster, PROMPT, stream)
    await until(lambda: len(cluster.gateway.queue) == 1)
    await client.hang_up()
    assert len(cluster.gateway.queue) == 0
    decode.drop("another")
    await cluster.until_quiet(SOON_S)
    assert computed(cluster, "p0", "prefill") == 0


async def test_many_clients_that_go_at_random_moments_leave_nothing(cluster: InProcessCluster) -> None:
    for round_number in range(10):
        clients = [Client(cluster, [n, *PROMPT[:20]], stream=n % 2 == 0) for n in range(8)]
        await asyncio.sleep(0.005 * round_number)
        for client in clients:
            client.asking.cancel()
        await asyncio.wait([client.asking for client in clients])
        await cluster.until_quiet(2 * SOON_S)
    assert cluster.gateway.metrics.inflight._value.get() == 0
