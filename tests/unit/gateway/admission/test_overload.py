"""Admission under open-loop load on virtual time: goodput, waits and shares at up to three times what the
workers can do. The workers are one queue each, with the speeds they report or others."""

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import msgspec
import pytest

from router.step_model import StepModel
from services.core.errors import Overloaded
from services.core.worker_report import sequence_tag
from services.gateway.admission.fair_queue import Priority
from services.gateway.workers.worker_client import OutputToken, PrefillResult
from services.wire.convert import attempt_id
from tests.sim.loop import LoopClock, VirtualLoop
from tests.unit.gateway.gateway_parts import GatewayParts, sequence
from tests.unit.gateway.scripted_worker_server import report

MS_PER_TOKEN = 1.0
PROMPT_TOKENS = (64, 128)  # 96 ms on average: P computes 10.4 prompts a second
SUSTAINABLE = 1e3 / (MS_PER_TOKEN * sum(PROMPT_TOKENS) / 2)
ANSWER_S, ANSWER_TOKENS = 0.5, 16
TARGET_S = 3.0
SECONDS = 40.0
FIRST_TOKEN = PrefillResult((OutputToken(0, 7),), 0, 0.0, 0.0)


@dataclass
class Seen:
    offered: Counter = field(default_factory=Counter)
    good: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        return sum(self.good.values()) / SECONDS


class Cluster(GatewayParts):
    """P computes one prompt after the other, `slowdown` times slower than it says. D has room for all."""

    def __init__(self, loop: VirtualLoop, seed: int, slowdown: float) -> None:
        super().__init__(LoopClock(loop))
        self.rng = random.Random(seed)
        self.slowdown = slowdown
        self.seen: defaultdict[str, Seen] = defaultdict(Seen)
        self.all = Seen()
        self._computing = asyncio.Lock()  # first come, first served
        self._queued: Counter[int] = Counter()  # tokens, by the tag of the sequence

    async def run(self, per_s: float, keys: dict[str, float], priorities: dict[Priority, float]) -> None:
        async with asyncio.TaskGroup() as tasks:
            reporting = tasks.create_task(self._report())
            at_s, number = 0.0, 0
            asking = []
            while (at_s := at_s + self.rng.expovariate(per_s)) < SECONDS:
                key = self.rng.choices([*keys], [*keys.values()])[0]
                priority = self.rng.choices([*priorities], [*priorities.values()])[0]
                asking.append(tasks.create_task(self._ask(at_s, f"r{number}", key, priority)))
                number += 1
            await asyncio.wait(asking)
            reporting.cancel()

    async def _report(self) -> None:
        speed = StepModel(step=0.0, token=MS_PER_TOKEN, sequence=1.0)
        for beat in range(1, 10**6):
            queued = sum(self._queued.values())
            prefill = report(
                *("p", "prefill"),
                model=speed,
                beat=beat,
                queued_prefill_tokens=queued,
                newest=[*self._queued],
            )
            await self.hear(
                prefill, report("d", "decode", model=speed, beat=beat, blocks_total=4000, blocks_free=4000)
            )
            await asyncio.sleep(0.25)

    async def _ask(self, at_s: float, name: str, key: str, priority: Priority) -> None:
        await asyncio.sleep(at_s)
        tokens = self.rng.randint(*PROMPT_TOKENS)
        wanted = msgspec.structs.replace(sequence(tokens, max_tokens=ANSWER_TOKENS), request_id=name)
        ticket = self.ticket(
            wanted, tenant=key, priority=priority, first_token_by=self.clock.now() + TARGET_S
        )
        both = (self.all, self.seen[key], self.seen[priority.label])
        for seen in both:
            seen.offered["all"] += 1
        try:
            await self.admission.admit(ticket)
            async with self.queue.place(ticket):
                await self._compute(ticket)
                waited_s = self.clock.now() - at_s
                for seen in both:
                    seen.first_token_s.append(waited_s)
                    seen.good["all"] += waited_s <= TARGET_S
                await asyncio.sleep(ANSWER_S)
        except Overloaded as error:
            for seen in both:
                seen.refused["late" if self.clock.now() > at_s else "at once"] += 1
                seen.retry_after_s.append(error.retry_after_s)
        finally:
            self.queue.leave(ticket)

    async def _compute(self, ticket) -> None:
        tokens, tag = ticket.sequence.known_tokens, sequence_tag(attempt_id(ticket.sequence.request_id, 1))
        self._queued[tag] = tokens
        async with self._computing:
            await asyncio.sleep(tokens * MS_PER_TOKEN * self.slowdown * self.rng.uniform(0.8, 1.2) / 1e3)
        del self._queued[tag]
        ticket.choices.deliver(OutputToken(0, 7))
        self.queue.note(ticket, FIRST_TOKEN)


ONE_KEY, ONE_CLASS = {"a": 1.0}, {Priority.NORMAL: 1.0}


def overloaded(
    factor: float, keys=ONE_KEY, priorities=ONE_CLASS, slowdown: float = 1.0, seed: int = 1
) -> Cluster:
    loop = VirtualLoop(seed)
    try:
        asyncio.set_event_loop(loop)
        cluster = Cluster(loop, seed, slowdown)
        loop.run_until_complete(cluster.run(factor * SUSTAINABLE / slowdown, keys, priorities))
        return cluster
    finally:
        asyncio.set_event_loop(None)
        loop.close()


FIVE_KEYS = {"flood": 5.0, "one": 1.0, "two": 1.0, "three": 1.0, "four": 1.0}
THREE_CLASSES = {Priority.HIGH: 1.0, Priority.NORMAL: 3.0, Priority.LOW: 1.0}


@pytest.mark.parametrize("slowdown", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_goodput_stays_at_what_the_workers_can_do_and_whoever_is_let_in_is_in_time(
    factor: float, slowdown: float
) -> None:
    """Also where the workers are three times slower or faster than their step models say."""
    seen = overloaded(factor, slowdown=slowdown).all
    assert seen.goodput >= 0.95 * SUSTAINABLE / slowdown
    assert len(seen.first_token_s) - seen.good["all"] <= 0.01 * len(seen.first_token_s)
    assert max(seen.first_token_s) <= 1.1 * TARGET_S
    assert seen.refused["late"] <= 0.15 * seen.refused.total(), "most are refused before any wait"


def test_below_what_the_workers_can_do_nobody_is_refused() -> None:
    for slowdown in (1.0, 3.0):
        seen = overloaded(0.7, slowdown=slowdown).all
        assert seen.refused.total() == 0
        assert seen.good == seen.offered


def test_keys_share_equally_however_much_each_sends() -> None:
    """At three times the load every key has more than a fifth to do."""
    keys = overloaded(3.0, FIVE_KEYS).seen
    goodput = [keys[name].goodput for name in FIVE_KEYS]
    assert keys["flood"].offered["all"] > 4 * keys["one"].offered["all"]
    assert max(goodput) <= 1.2 * min(goodput)


def test_keys_share_also_where_so_few_may_wait_that_the_door_decides() -> None:
    """2.6 prompts a second and a wait of 3 s: by chance alone the key that comes most often got five times
    as much."""
    keys = overloaded(3.0, FIVE_KEYS, slowdown=4.0).seen
    others = [keys[name].goodput for name in FIVE_KEYS if name != "flood"]
    assert keys["flood"].goodput <= 1.8 * sum(others) / len(others)


def test_high_priority_is_served_in_full_and_low_is_not_starved() -> None:
    cluster = overloaded(3.0, ONE_KEY, THREE_CLASSES)
    high, low, refused = cluster.seen["high"], cluster.seen["low"], cluster.all.refused
    assert high.good["all"] >= 0.98 * high.offered["all"]
    assert low.good["all"] >= 0.05 * low.offered["all"]
    assert sorted(high.first_token_s)[len(high.first_token_s) // 2] < 1.0
    assert refused["late"] <= 0.2 * refused.total(), "low ones know that others will overtake them"


def test_a_refusal_says_to_come_again_when_the_queue_has_moved_on() -> None:
    retry_after_s = overloaded(3.0).all.retry_after_s
    assert all(1 <= seconds <= 2 * TARGET_S for seconds in retry_after_s)
