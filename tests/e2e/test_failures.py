"""Parts of a running cluster are killed; clients see nothing but a pause.

Each test kills real processes of a real cluster with SIGKILL and waits, in the end, until `up` has
brought everything back.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import httpx
import pytest

from tests.e2e.conftest import Clusters
from tests.support.cluster import RunningCluster
from tests.support.completions import Answer, chunks, complete, greedy, logprobs_of
from tests.support.kernels import scores

PROMPT = "The two panels of a diptych are joined by a hinge, and"
LONG_PROMPT = [n * 7919 % 40_000 + 100 for n in range(3000)]  # its prefill takes seconds on one core
TOKENS = 600  # for more than a second
KILL_AFTER = 20  # tokens
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
PENALIZED = SAMPLED | {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
UNSEEDED = {"temperature": 1.0}  # the gateway draws a seed


@pytest.fixture
def cluster(two_and_two: RunningCluster) -> RunningCluster:
    return two_and_two


def scored(prompt: Sequence[int] | str, tokens: int) -> dict:
    """A greedy request that is told how likely its tokens and others were."""
    return greedy(prompt, tokens) | scores()


@pytest.fixture(autouse=True)
async def all_parts_come_back(clusters: Clusters) -> AsyncIterator[None]:
    """A restarted worker has taken a new epoch before the next test looks for it."""
    yield
    for cluster in clusters.running.values():
        await cluster.await_quiet(timeout_s=60)


async def streamed(http: httpx.AsyncClient, body: dict, at: int, then: Callable[[dict], None]) -> Answer:
    """The whole streamed answer; `then` is called once, with the chunk that brings token number `at`."""
    token_ids: list[int] = []
    logprobs: list = []
    text, last = "", {}
    async with aclosing(chunks(http, body)) as stream:
        async for last in stream:
            before = len(token_ids)
            for choice in last["choices"]:
                token_ids += choice["token_ids"]
                logprobs += logprobs_of(choice)
                text += choice["text"]
            if before < at <= len(token_ids):
                then(last)
    return Answer(tuple(token_ids), text, last["usage"], last["timings"], tuple(logprobs))


def check_undisturbed(answer: Answer, undisturbed: Answer) -> None:
    """The same tokens, the same logprobs to the last bit, and usage as if nothing had happened."""
    assert answer.token_ids == undisturbed.token_ids
    assert answer.logprobs == undisturbed.logprobs
    assert answer.text == undisturbed.text
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert answer.usage[field] == undisturbed.usage[field]


async def busy_worker(cluster: RunningCluster, role: str) -> str:
    """The name of the one worker of a role that holds a sequence."""

    async def find() -> list[str]:
        seen = await cluster.worker_metrics()
        return [w for w in seen if w.startswith(role) and seen[w].value("diptych_worker_sequences") > 0]

    async with asyncio.timeout(30):
        while not (busy := await find()):
            await asyncio.sleep(0.01)
    assert len(busy) == 1
    return busy[0]


@pytest.mark.parametrize(
    ("part", "sampling"),
    [("", PENALIZED), (" engine", UNSEEDED)],
    ids=["worker, penalized", "engine, unseeded"],
)
async def test_a_stream_goes_on_elsewhere_when_its_decode_worker_is_killed(
    cluster: RunningCluster, part: str, sampling: dict
) -> None:
    """Kills the worker's process, or the engine process below it."""
    said, body = len(cluster.said), scored(PROMPT, TOKENS) | sampling
    killed: list[str] = []
    reached = asyncio.Event()

    async def kill() -> None:
        await reached.wait()
        killed.append(await busy_worker(cluster, "decode"))
        cluster.processes()[killed[0] + part].kill()

    async with cluster.http() as http:
        killing = asyncio.create_task(kill())
        answer = await streamed(http, body, KILL_AFTER, lambda _: reached.set())
        await killing
        undisturbed = await complete(
            http, body | {"seed": answer.timings["seed"], "cache_salt": "undisturbed"}
        )
    check_undisturbed(answer, undisturbed)
    assert answer.timings["attempts"] == 2
    assert answer.timings["decode_worker"] != killed[0]
    await cluster.until_said(f"{killed[0]} is ready again", after=said)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_goes_elsewhere_when_a_worker_is_killed_during_its_prefill(
    cluster: RunningCluster, role: str
) -> None:
    said, body = len(cluster.said), scored(LONG_PROMPT, 8) | {"cache_salt": f"killed {role}"}
    async with cluster.http() as http:
        answering = asyncio.create_task(complete(http, body))
        killed = await busy_worker(cluster, role)
        cluster.processes()[killed].kill()
        answer = await answering
        undisturbed = await complete(http, body | {"cache_salt": "undisturbed"})
    check_undisturbed(answer, undisturbed)
    assert answer.timings["attempts"] == 2
    assert answer.timings[f"{role}_worker"] not in (killed, None)
    await cluster.until_said(f"{killed} is ready again", after=said)


@pytest.mark.parametrize("part", ["", " engine"], ids=["worker", "engine"])
async def test_a_request_goes_elsewhere_when_its_prefill_worker_stands_still(
    cluster: RunningCluster, part: str
) -> None:
    body = scored(LONG_PROMPT, 8) | {"cache_salt": f"stopped {part}"}
    async with cluster.http() as http:
        undisturbed = await complete(http, body | {"cache_salt": "undisturbed"})
        answering = asyncio.create_task(complete(http, body))
        stopped = await busy_worker(cluster, "prefill")
        process = cluster.processes()[stopped + part]
        process.send_signal(signal.SIGSTOP)
        try:
            answer = await answering
        finally:
            process.send_signal(signal.SIGCONT)
    check_undisturbed(answer, undisturbed)
    assert answer.timings["prefill_worker"] != stopped


async def test_streams_and_new_requests_go_on_while_valkey_is_dead(cluster) -> None:
    async with cluster.http() as http:
        undisturbed = await complete(http, greedy(PROMPT, TOKENS))
        valkey = cluster.processes()["valkey"]
        killed = asyncio.Event()

        def kill(_: dict) -> None:
            # Stopped, it cannot be restarted before the requests are through; killed, it is.
            valkey.send_signal(signal.SIGSTOP)
            killed.set()

        streaming = asyncio.create_task(streamed(http, greedy(PROMPT, TOKENS), KILL_AFTER, kill))
        await killed.wait()
        await asyncio.sleep(2.5)  # longer than the workers' leases
        check_undisturbed(await complete(http, greedy(PROMPT, TOKENS)), undisturbed)
        check_undisturbed(await streaming, undisturbed)
        said = len(cluster.said)
        valkey.kill()
        check_undisturbed(await complete(http, greedy(PROMPT, TOKENS)), undisturbed)
    await cluster.until_said("valkey exited with code -9; restarting", after=said)
    await cluster.await_quiet(timeout_s=60)  # which needs all workers' reports in the new Valkey
    assert cluster.processes()["valkey"].pid != valkey.pid


async def test_without_a_prefill_worker_the_decode_worker_computes_prompts_too(split: RunningCluster) -> None:
    said = len(split.said)
    async with split.http() as http:
        undisturbed = await complete(http, scored(PROMPT, 16))
        assert undisturbed.timings["prefill_worker"] == "prefill-0"
        split.processes()["prefill-0"].kill()
        answer = await complete(http, scored(PROMPT, 16))
        check_undisturbed(answer, undisturbed)
        assert answer.timings["prefill_worker"] is None
        await split.until_said("prefill-0 exited with code -9; restarting", after=said)
        await split.until_said("prefill-0 is ready again", after=said)
        await split.await_quiet()
        again = await complete(http, scored(PROMPT, 16))
    check_undisturbed(again, undisturbed)
    assert again.timings["prefill_worker"] == "prefill-0"


def test_the_parts_are_commands_that_a_person_can_read_in_the_process_table(cluster) -> None:
    parts = cluster.processes()
    workers = {f"{role}-{number}" for role in ("prefill", "decode") for number in (0, 1)}
    engines = {f"{worker} engine" for worker in workers}
    gateways = {"gateway", "gateway templates"}
    assert parts.keys() - {"gateway grammars"} == {"valkey"} | gateways | workers | engines
    commands = {name: " ".join(process.cmdline()) for name, process in parts.items()}
    assert "diptych worker --role prefill --worker-id prefill-0" in commands["prefill-0"]
    assert "diptych worker --role decode --worker-id decode-1" in commands["decode-1"]
    assert f"diptych gateway --host 127.0.0.1 --port {cluster.url.rpartition(':')[2]}" in commands["gateway"]
