"""Who is let in, who is refused and why, and what a refusal says. On a manual clock."""

import asyncio
import json

import pytest

from router.step_model import StepModel
from services.core.clock import ManualClock
from services.core.errors import Overloaded
from services.gateway.admission.admission import DEADLINE_SHARE, AdmissionLimits
from services.gateway.admission.fair_queue import Priority
from services.gateway.admission.place_queue import RETRY_AFTER_S_MAX
from services.gateway.admission.ticket import Ticket
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from services.gateway.workers.worker_client import OutputToken, PrefillResult
from tests.unit.gateway.gateway_parts import GatewayParts, sequence
from tests.unit.gateway.in_memory_cluster import MODEL, until
from tests.unit.gateway.scripted_worker_server import report

MS_PER_TOKEN = 1.0
SPEED = StepModel(step=0.0, token=MS_PER_TOKEN, sequence=1.0)
FIRST_TOKEN = PrefillResult((OutputToken(0, 7),), 0, 0.0, 0.0)


class Door(GatewayParts):
    """P computes 1,000 tokens a second and has a prompt of 2,000; whoever comes waits for it."""

    def __init__(self, **limits) -> None:
        super().__init__(ManualClock(), admission=AdmissionLimits(**limits))
        self.came: list[Ticket] = []

    @classmethod
    async def busy(cls, **limits) -> "Door":
        door = cls(**limits)
        await door.work()
        return door

    async def work(self) -> None:
        await self.hear(report("p", "prefill", model=SPEED), report("d", "decode", model=SPEED))
        self.first = await self.come(2000)
        assert self.first.place is not None

    async def come(self, tokens: int = 100, choices: int = 1, **changes):
        ticket = self.ticket(sequence(tokens, choices, max_tokens=10), **changes)
        await self.admission.admit(ticket)
        self.came.append(ticket)
        return ticket

    async def refused(self, reason: str, match: str, *args, **changes) -> Overloaded:
        waiting, before = len(self.queue), self.metric("rejections_total", reason=reason)
        with pytest.raises(Overloaded, match=match) as caught:
            await self.come(*args, **changes)
        assert len(self.queue) == waiting
        assert self.metric("rejections_total", reason=reason) == before + 1
        assert f"Try again in {caught.value.retry_after_s} s." in str(caught.value)
        assert 1 <= caught.value.retry_after_s <= RETRY_AFTER_S_MAX
        return caught.value

    async def close(self) -> None:
        for ticket in [*self.queue, self.first]:
            self.queue.leave(ticket)
        await asyncio.sleep(0.01)
        assert self.queue._dispatcher.done()


@pytest.fixture
async def busy():
    doors: list[Door] = []

    async def make(**limits) -> Door:
        doors.append(await Door.busy(**limits))
        return doors[-1]

    yield make
    for door in doors:
        await door.close()


async def test_a_queue_has_a_length_and_choices_count_each(busy) -> None:
    door = await busy(length_max=6, tenant_share=1.0)
    await door.come(choices=3)
    await door.come()
    await door.refused("length", "Too many requests wait for this server", choices=3)
    await door.come(choices=2)
    await door.refused("length", "Too many requests wait for this server")


async def test_one_key_cannot_take_the_whole_queue(busy) -> None:
    door = await busy(length_max=6, tenant_share=0.5)
    for _ in range(3):
        await door.come(tenant="a")
    await door.refused("length", "of this API key", tenant="a")
    for _ in range(3):
        await door.come(tenant="b")
    await door.refused("length", "Too many requests wait for this server", tenant="c")


async def test_queued_tokens_are_bounded_in_all_and_for_each_key(busy) -> None:
    door = await busy(tokens_max=1000, tenant_share=0.5)
    await door.come(300, tenant="a")
    await door.refused("tokens", "of this API key", 300, tenant="a")
    await door.come(300, tenant="b")
    await door.refused("tokens", "Requests of too many tokens wait for this server", 400, tenant="c")


async def test_answers_may_need_only_so_much_kv(busy) -> None:
    """D holds 512 blocks of 16 tokens."""
    door = await busy(decode_pools_max=0.5)
    await door.come(1000)
    await door.refused("decode", "KV memory", 1200)
    await door.come(1000)


async def test_whoever_finds_nobody_waiting_is_let_in_whatever_its_size(busy) -> None:
    door = await busy(length_max=1, tokens_max=10, decode_pools_max=0.01)
    assert (await door.come(300, choices=4)).waiting


async def test_a_first_token_that_would_come_too_late_is_refused_at_once(busy) -> None:
    """The prompt under way takes 2 s, the two that wait 0.5 s each, and this one 0.5 s."""
    door = await busy()
    for _ in range(2):
        await door.come(500)
    expected_s = door.queue.wait_s(door.ticket(sequence(500), cost=510, service_ms=500.0)) + 2.5
    error = await door.refused("deadline", "would begin in about", 500, first_token_by=2.0)
    assert error.retry_after_s == pytest.approx(expected_s - 2.0 * DEADLINE_SHARE, abs=1.0)
    await door.come(500, first_token_by=1.1 * expected_s / DEADLINE_SHARE)


async def test_an_idle_cluster_refuses_nobody() -> None:
    """Whatever its cost model says: it would never learn better."""
    door = Door()
    await door.hear(report("p", "prefill", model=SPEED), report("d", "decode", model=SPEED))
    ticket = await door.come(2000, first_token_by=0.1)
    assert ticket.place is not None
    door.queue.leave(ticket)


async def test_high_priority_is_let_in_where_low_is_refused(busy) -> None:
    door = await busy()
    for _ in range(10):
        await door.come(500)
    await door.refused("deadline", "would begin", 1000, first_token_by=7.0, priority=Priority.LOW)
    await door.come(1000, first_token_by=7.0, priority=Priority.HIGH)


async def test_a_key_with_little_in_the_queue_is_let_in_where_one_with_much_is_refused(busy) -> None:
    door = await busy()
    for _ in range(10):
        await door.come(500, tenant="much")
    await door.refused("deadline", "would begin", 100, first_token_by=7.0, tenant="much")
    await door.come(100, first_token_by=7.0, tenant="little")


async def test_predictions_follow_what_is_seen(busy) -> None:
    """Workers that take four times as long as they say make waits be expected four times as long."""
    door = await busy()
    running = door.first
    expected: list[float] = []
    for _ in range(20):
        await door.come(500)
        expected.append(door.queue.wait_s(door.ticket(sequence(500), cost=510, service_ms=500.0)))
        door.clock.advance(2.0)
        door.queue.note(running, FIRST_TOKEN)
        door.queue.leave(running)
        await asyncio.sleep(0.001)
        (running,) = [ticket for ticket in door.came if ticket.place is not None]
    assert expected[-1] == pytest.approx(2.0, rel=0.2)
    door.first = running


class TestOverHttp:
    @pytest.fixture
    def network(self) -> bool:
        return False

    async def test_a_refusal_is_a_429_with_retry_after_and_no_work(self, start_cluster) -> None:
        cluster = await start_cluster(queue_length_max=1, queue_tenant_share=1.0, worker_queue_ms_max=0.0)
        cluster.workers.script(ANY_WORKER, "prefill", *[Fault(None)] * 2)
        cluster.workers.script(ANY_WORKER, "decode", *[Fault(None)] * 2)
        body = {"model": MODEL, "prompt": [1] * 900}
        asking = [asyncio.create_task(cluster.http.post("/v1/completions", json=body)) for _ in range(3)]
        await until(lambda: cluster.metric("queue_length", priority="normal") == 1)
        admitted, calls = cluster.metric("stage_seconds_count", stage="admitted"), len(cluster.workers.calls)
        refused = await cluster.http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert len(cluster.workers.calls) == calls
        assert cluster.metric("stage_seconds_count", stage="admitted") == admitted
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)

    async def test_a_stream_that_is_refused_is_a_429_too(self, start_cluster) -> None:
        cluster = await start_cluster(inflight_max=0)
        body = {"model": MODEL, "prompt": "a", "stream": True}
        refused = await cluster.http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert "Try again in" in json.loads(refused.text)["error"]["message"]

    @pytest.mark.parametrize(
        ("fields", "label"),
        [
            ({}, "normal"),
            ({"priority": -3}, "high"),
            ({"priority": 0, "service_tier": "flex"}, "normal"),
            ({"priority": 7}, "low"),
            ({"service_tier": "priority"}, "high"),
            ({"service_tier": "flex"}, "low"),
            ({"service_tier": "auto"}, "normal"),
            ({"service_tier": "default"}, "normal"),
        ],
    )
    async def test_priority_is_vllm_s_or_openai_s(self, start_cluster, fields, label: str) -> None:
        cluster = await start_cluster()
        answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a", **fields})
        assert answered.status_code == 200
        assert cluster.metric("queue_seconds_count", priority=label) == 1

    @pytest.mark.parametrize("fields", [{"ttft_max_s": 0}, {"ttft_max_s": "soon"}, {"priority": "high"}])
    async def test_nonsense_is_a_400(self, start_cluster, fields) -> None:
        cluster = await start_cluster()
        answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a", **fields})
        assert answered.status_code == 400
        assert answered.json()["error"]["param"] == next(iter(fields))
