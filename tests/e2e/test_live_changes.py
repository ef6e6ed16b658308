"""Workers that stop and go on, drain, restart and change their roles; clients see nothing but a pause."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable

import httpx
import psutil
import pytest

from services.core.worker_report import Role, WorkerReport
from services.launch.lock import lock_from_state
from services.wire.cluster_lock import lock_network
from services.wire.control import set_role
from tests.e2e.conftest import Clusters
from tests.e2e.test_failures import KILL_AFTER, PROMPT, TOKENS, busy_worker, check_undisturbed, streamed
from tests.support.cluster import ClusterSpec, RunningCluster
from tests.support.completions import Answer, chunks, complete, greedy

# Streams take longer than this grace: what drains must hand them over.
CHANGING = ClusterSpec(prefill=1, decode=2, split="always", blocks=400, drain_grace_s=0.2)
PAUSE_S_MAX = 4.0


@pytest.fixture
def cluster(clusters: Clusters) -> RunningCluster:
    return clusters.get_only(CHANGING)


async def reported(
    cluster: RunningCluster, worker: str, what: Callable[[WorkerReport], bool], timeout_s: float = 10.0
) -> WorkerReport:
    """The worker's report, once it says so."""
    async with asyncio.timeout(timeout_s):
        while True:
            for report in await cluster.reports():
                if report.worker_id == worker and what(report):
                    return report
            await asyncio.sleep(0.02)


async def readiness(http: httpx.AsyncClient, report: WorkerReport) -> int:
    """The status of a worker's /health/ready."""
    return (await http.get(report.metrics_url.replace("/metrics", "/health/ready"))).status_code


@contextlib.contextmanager
def stopped(*processes: psutil.Process) -> AsyncIterator[None]:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


async def longest_pause_s(http: httpx.AsyncClient, body: dict, reached: asyncio.Event) -> float:
    """Streams an answer; the longest time between two of its tokens. Sets `reached` after KILL_AFTER."""
    longest, last_s, tokens = 0.0, None, 0
    async for chunk in chunks(http, body):
        now = time.monotonic()
        if last_s is not None:
            longest = max(longest, now - last_s)
        last_s = now
        tokens += sum(len(choice["token_ids"]) for choice in chunk["choices"])
        if tokens >= KILL_AFTER:
            reached.set()
    return longest


async def test_an_engine_that_stops_and_goes_on_costs_a_pause(cluster: RunningCluster) -> None:
    body, reached = greedy(PROMPT, TOKENS), asyncio.Event()
    async with cluster.http() as http:
        undisturbed = await complete(http, body)
        streaming = asyncio.create_task(streamed(http, body, KILL_AFTER, lambda _: reached.set()))
        await reached.wait()
        worker = await busy_worker(cluster, "decode")
        with stopped(cluster.processes()[f"{worker} engine"]):
            stopped_s = time.monotonic()
            stalled = await reported(cluster, worker, lambda report: report.state == "stalled")
            assert await readiness(http, stalled) == 503
            check_undisturbed(await streaming, undisturbed)  # elsewhere, while it still stands
            await asyncio.sleep(max(0.0, 5.0 - (time.monotonic() - stopped_s)))
        back = await reported(cluster, worker, lambda report: report.state == "ready")
        assert back.epoch == stalled.epoch
        assert await readiness(http, back) == 200
        seen = (await cluster.worker_metrics())[worker]
        assert seen.value("diptych_worker_engine_overdue_total") == 1
        await check_serves(cluster, http, worker, undisturbed)


async def test_a_worker_that_stops_and_goes_on_is_another_incarnation(cluster: RunningCluster) -> None:
    body, reached = greedy(PROMPT, TOKENS), asyncio.Event()
    async with cluster.http() as http:
        undisturbed = await complete(http, body)
        streaming = asyncio.create_task(longest_pause_s(http, body, reached))
        await reached.wait()
        worker = await busy_worker(cluster, "decode")
        before = await reported(cluster, worker, lambda report: True)
        processes = cluster.processes()
        with stopped(processes[worker], processes[f"{worker} engine"]):
            # Requests that may yet be sent there, and those that come when nobody knows of it yet.
            answers = [asyncio.create_task(complete(http, greedy(PROMPT, 8))) for _ in range(4)]
            assert await streaming < PAUSE_S_MAX
            await asyncio.gather(*answers)
        after = await reported(cluster, worker, lambda report: report.epoch != before.epoch)
        assert after.state == "ready"
        assert (await cluster.worker_metrics())[worker].value("diptych_worker_epochs_total") == 1
        await check_serves(cluster, http, worker, undisturbed)


async def check_serves(
    cluster: RunningCluster, http: httpx.AsyncClient, worker: str, undisturbed: Answer
) -> None:
    """With the other decode worker taken away, requests go to `worker`."""
    (other,) = {"decode-0", "decode-1"} - {worker}
    await change_role(cluster, other, "prefill")
    answer = await complete(http, greedy(PROMPT, TOKENS))
    await change_role(cluster, other, "decode")
    check_undisturbed(answer, undisturbed)
    assert answer.timings["decode_worker"] == worker


@contextlib.asynccontextmanager
async def under_load(cluster: RunningCluster, tokens: int) -> AsyncIterator[None]:
    """Two streams at any time; each must have the tokens of an undisturbed one."""
    body, over = greedy(PROMPT, tokens), False

    async def ask(http: httpx.AsyncClient) -> int:
        asked = 0
        while not over:
            answer = await streamed(http, body, KILL_AFTER, lambda _: None)
            check_undisturbed(answer, undisturbed)
            asked += 1
        return asked

    async with cluster.http() as http:
        undisturbed = await complete(http, body)
        asking = [asyncio.create_task(ask(http)) for _ in range(2)]
        try:
            yield
        finally:
            over = True
        assert all(await asyncio.gather(*asking))


async def test_a_restart_of_every_worker_under_load_fails_no_request(cluster: RunningCluster) -> None:
    handed_over = 0
    async with under_load(cluster, tokens=1200):
        for worker in ("decode-0", "decode-1", "prefill-0"):
            said = len(cluster.said)
            draining = cluster.processes()[worker]
            draining.send_signal(signal.SIGTERM)
            report = await reported(cluster, worker, lambda report: report.state == "draining")
            async with cluster.http() as http:
                assert await readiness(http, report) == 503
            await cluster.until_said(f"{worker} is ready again", after=said)
            log = (cluster.home / f"logs/{worker}.log").read_text()
            handed_over += "handed 0 sequences over" not in log and " sequences over" in log
    assert handed_over >= 1, "every stream had ended before the grace was over"


async def test_roles_change_under_load_and_no_request_fails(cluster: RunningCluster) -> None:
    async with under_load(cluster, tokens=TOKENS):
        for worker, role in (
            ("decode-0", "prefill"),
            ("prefill-0", "both"),
            ("decode-1", "prefill"),  # from here only prefill-0 decodes
            ("decode-0", "decode"),
            ("prefill-0", "prefill"),
            ("decode-1", "decode"),
        ):
            await change_role(cluster, worker, role)
            await asyncio.sleep(0.5)


async def change_role(cluster: RunningCluster, worker: str, role: Role) -> None:
    """As `diptych role` does it; returns when the cluster has heard of it."""
    address = (await reported(cluster, worker, lambda report: True)).address
    network = lock_network(lock_from_state(cluster.state.lock))
    await set_role(network, address, worker, role, timeout_s=5.0)
    await reported(cluster, worker, lambda report: report.role == role, timeout_s=1.0)
