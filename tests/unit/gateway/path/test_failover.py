"""A worker's failure is invisible: the same tokens, exact usage, whatever fails and when."""

import asyncio
import json

import pytest

from services.core.errors import (
    Draining,
    EngineFailed,
    Incompatible,
    KvCorrupt,
    KvSourceLost,
    LeaseExpired,
    Overloaded,
    PullerLost,
    RoleChanged,
    WorkerLost,
)
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL, four_workers, until
from tests.unit.gateway.scripted_worker_server import report

LOST = WorkerLost("connection reset")
RETRYABLE = [LOST, KvSourceLost("gone"), KvCorrupt("bits"), LeaseExpired("late"), EngineFailed("boom")]


@pytest.fixture
def network() -> bool:
    return False


async def ask(cluster, **more) -> dict:
    body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 200, "timings": True, **more}
    answered = await cluster.http.post("/v1/completions", json=body)
    assert answered.status_code == 200, answered.text
    return answered.json()


def assert_whole(cluster, answer: dict) -> None:
    assert answer["choices"][0]["text"] == ANSWER
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == len(cluster.answer_ids)


@pytest.mark.parametrize("error", RETRYABLE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("tokens", [0, 1, 5])
async def test_a_failing_decode_is_resumed_with_the_same_tokens(cluster, error, tokens) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(error, after_tokens=tokens))
    answer = await ask(cluster)
    assert_whole(cluster, answer)
    assert answer["timings"]["attempts"] == 2
    outputs = [call.sequence.output_ids for call in cluster.workers.calls if call.kind == "decode"]
    assert all(ids == cluster.answer_ids[: len(ids)] for ids in outputs)
    assert sorted(map(len, outputs)) == list(map(len, outputs))


@pytest.mark.parametrize("error", [Incompatible("layout: a != b"), PullerLost("nobody came")])
async def test_two_workers_that_cannot_work_together_are_not_paired_again(cluster, error) -> None:
    for _ in range(10):
        cluster.workers.calls.clear()
        cluster.workers.script(ANY_WORKER, "decode", Fault(error))
        assert_whole(cluster, await ask(cluster))
        by_attempt: dict[int, set[str]] = {}
        for call in cluster.workers.calls:
            by_attempt.setdefault(call.sequence.attempt, set()).add(call.worker.worker_id)
        first, second = by_attempt.values()
        assert first != second


@pytest.mark.parametrize("error", [LOST, EngineFailed("boom")], ids=["lost", "engine"])
async def test_a_failing_prefill_goes_to_the_other_worker(cluster, error) -> None:
    cluster.workers.script("p1", "prefill", *[Fault(error)] * 10)
    answers = [await ask(cluster) for _ in range(5)]
    for answer in answers:
        assert_whole(cluster, answer)
        assert answer["timings"]["prefill_worker"] == "p2"


async def test_a_resume_computes_what_was_delivered_and_goes_on_after_it(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=4))
    await ask(cluster)
    first, second, *_ = [call.sequence for call in cluster.workers.calls if call.kind == "prefill"]
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.output_ids == []
    assert second.output_ids == cluster.answer_ids[:5]
    assert second.sampling == first.sampling
    assert second.request_id == first.request_id


async def test_a_drawn_seed_is_kept_over_the_attempts_and_differs_between_requests(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=2))
    await ask(cluster)
    seeds = {call.sequence.sampling.seed for call in cluster.workers.calls}
    assert len(seeds) == 1
    await ask(cluster)
    assert len({call.sequence.sampling.seed for call in cluster.workers.calls}) == 2


async def test_the_failed_worker_is_not_asked_again(cluster) -> None:
    cluster.workers.script("d1", "decode", *[Fault(LOST, after_tokens=1)] * 10)
    for _ in range(4):
        answer = await ask(cluster)
        assert_whole(cluster, answer)
        assert answer["timings"]["decode_worker"] == "d2"
    by_request: dict[str, list[str]] = {}
    for call in cluster.workers.calls:
        if call.kind == "decode":
            by_request.setdefault(call.sequence.request_id, []).append(call.worker.worker_id)
    assert all(workers.count("d1") <= 1 for workers in by_request.values())


async def test_a_lost_kv_source_excludes_the_source_and_not_the_decode_worker(start_cluster) -> None:
    cluster = await start_cluster(
        reports=[report("p1", "prefill"), report("p2", "prefill"), report("d1", "decode")]
    )
    cluster.workers.script("d1", "decode", Fault(KvSourceLost("gone")))
    assert_whole(cluster, await ask(cluster))
    sources = [call.source.worker_id for call in cluster.workers.calls if call.kind == "decode"]
    assert sorted(sources) == ["p1", "p2"]


async def test_without_another_prefill_worker_the_decode_worker_does_all(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("p1", "prefill"), report("d1", "decode")])
    cluster.workers.script("p1", "prefill", Fault(LOST))
    assert_whole(cluster, await ask(cluster))
    assert cluster.metric("routes_total", kind="decode_alone") == 1


async def test_a_restarted_worker_is_used_again_under_its_new_epoch(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("d1", "decode", epoch=1)], admission_timeout_s=60)
    cluster.workers.script("d1", "decode", Fault(LOST, after_tokens=3))
    asking = asyncio.create_task(ask(cluster))
    while cluster.metric("retries_total", error="worker_lost") == 0:
        await asyncio.sleep(0.005)
    await cluster.membership.announce(report("d1", "decode", epoch=2))
    await cluster.gateway.view.refresh()
    assert_whole(cluster, await asking)
    assert [call.worker.epoch for call in cluster.workers.calls] == [1, 2]


async def test_waiting_for_room_is_no_attempt_and_excludes_nobody(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("d1", "decode")], attempts_max=1, admission_timeout_s=60)
    cluster.workers.script("d1", "decode", *[Fault(Overloaded("full"))] * 3)
    assert_whole(cluster, await ask(cluster))
    assert cluster.metric("retries_total", error="overloaded") == 3


@pytest.mark.parametrize("error", [Draining("stops"), RoleChanged("prefills now")], ids=["drain", "role"])
@pytest.mark.parametrize("tokens", [0, 4])
async def test_a_worker_that_sends_its_work_away_costs_no_attempt(start_cluster, error, tokens) -> None:
    cluster = await start_cluster(attempts_max=1)
    cluster.workers.script(ANY_WORKER, "decode", Fault(error, after_tokens=tokens))
    assert_whole(cluster, await ask(cluster))
    first, second = [call.worker for call in cluster.workers.calls if call.kind == "decode"]
    assert first != second


async def test_a_resumed_stream_shows_no_seam(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(LOST, after_tokens=6))
    body = {"model": MODEL, "prompt": "x", "max_tokens": 200, "stream": True}
    answered = await cluster.http.post(
        "/v1/completions", json=body | {"stream_options": {"include_usage": True}}
    )
    *events, done = [event.removeprefix("data: ") for event in answered.text.rstrip().split("\n\n")]
    *chunks, last = map(json.loads, events)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER
    assert last["usage"]["completion_tokens"] == len(cluster.answer_ids)
    assert done == "[DONE]"


async def test_a_worker_that_leaves_membership_hands_over_its_sequences(start_cluster) -> None:
    cluster = await start_cluster()
    cluster.workers.script(ANY_WORKER, "decode", Fault(None, after_tokens=2))
    asking = asyncio.create_task(ask(cluster))
    await until(lambda: any(call.kind == "decode" for call in cluster.workers.running))
    stuck = next(call for call in cluster.workers.running if call.kind == "decode").worker
    await cluster.workers.keep_only([w for w in four_workers() if w.key != stuck])
    answer = await asking
    assert_whole(cluster, answer)
    assert answer["timings"]["decode_worker"] != stuck.worker_id
