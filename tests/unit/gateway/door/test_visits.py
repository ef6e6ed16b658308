"""What a gateway counts for its keys, with a store that comes and goes."""

import logging

import pytest
from prometheus_client import CollectorRegistry

from services.core.clock import ManualClock
from services.core.errors import RateLimited
from services.gateway.door.tenant import Tenant
from services.gateway.door.visits import AWAY_S, Visit, Visits
from services.gateway.key_metrics import KeyMetrics
from services.keys.api_key import KeyLimits
from services.keys.memory_limits import MemoryLimits
from services.keys.protocol import WINDOW_S


class CountingLimits(MemoryLimits):
    calls = 0

    async def take(self, *args):
        self.calls += 1
        return await super().take(*args)

    async def settle(self, *args):
        self.calls += 1
        await super().settle(*args)


class Subject:
    def __init__(self, **limits) -> None:
        self.clock = ManualClock(1e6)
        self.store = CountingLimits(self.clock)
        self.visits = Visits(self.store, KeyMetrics(CollectorRegistry()), self.clock)
        self.tenant = Tenant(id="0f3a9c1b2d4e", name="alice", limits=KeyLimits(**limits))
        self._leases = iter(range(1000))

    async def enter(self) -> Visit | None:
        """None: refused."""
        visit = self.visits.of(self.tenant, f"r{next(self._leases)}")
        try:
            await self.visits.enter(visit)
        except RateLimited:
            return None
        return visit


async def test_after_a_failure_the_store_is_left_alone_for_a_while(caplog) -> None:
    subject = Subject(requests_per_minute=100)
    subject.store.available = False
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            assert await subject.enter() is not None
        assert subject.store.calls == 1
        subject.clock.advance(AWAY_S)
        assert await subject.enter() is not None
        assert subject.store.calls == 2
        subject.store.available = True
        subject.clock.advance(AWAY_S)
        for _ in range(3):
            assert await subject.enter() is not None
    assert subject.store.calls == 5
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_what_was_used_before_counts_when_the_store_goes() -> None:
    subject = Subject(requests_per_minute=2, concurrent=2)
    first = await subject.enter()
    assert first is not None
    subject.store.available = False
    assert await subject.enter() is not None
    assert await subject.enter() is None
    subject.visits.leave(first)
    await subject.visits.settle_ended()
    subject.clock.advance(WINDOW_S)
    assert await subject.enter() is not None


async def test_a_store_that_lost_everything_learns_who_runs() -> None:
    subject = Subject(concurrent=1)
    assert await subject.enter() is not None
    subject.store.lose_everything()
    await subject.visits.settle_running()
    assert await subject.enter() is None


async def test_tokens_are_counted_once_however_often_they_are_looked_at() -> None:
    subject, said = Subject(tokens_per_minute=100), [0]
    visit = await subject.enter()
    assert visit is not None
    visit.count_answer(lambda: said[-1])
    await visit.take_prompt(10)
    for tokens in (5, 5, 20):
        said.append(tokens)
        await subject.visits.settle_running()
    said.append(60)
    subject.visits.leave(visit)
    await subject.visits.settle_ended()
    again = await subject.enter()
    assert again is not None
    assert again.headers["x-ratelimit-remaining-tokens"] == "30"
    assert again.headers["x-ratelimit-reset-tokens"] == "42.000s"


async def test_a_refused_request_leaves_nothing_behind() -> None:
    subject = Subject(concurrent=1)
    first = await subject.enter()
    assert first is not None
    for _ in range(3):
        assert await subject.enter() is None
    subject.visits.leave(first)
    await subject.visits.settle_ended()
    assert not subject.visits._running
    assert await subject.enter() is not None


@pytest.mark.parametrize("limits", [{}, {"requests_per_minute": 5}])
async def test_a_key_whose_answers_need_no_counting_costs_no_call_at_its_end(limits) -> None:
    subject = Subject(**limits)
    visit = await subject.enter()
    assert visit is not None
    calls = subject.store.calls
    await visit.take_prompt(100)
    await subject.visits.settle_running()
    subject.visits.leave(visit)
    await subject.visits.settle_ended()
    assert subject.store.calls == calls
