"""Who gets a place, in which order, and how a wait ends. On a manual clock."""

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from services.core.clock import ManualClock
from services.core.errors import DeadlineExceeded, NoWorker, Overloaded
from services.core.worker_report import WorkerReport
from services.gateway.admission.fair_queue import Priority
from services.gateway.admission.place_queue import HOLD_BACK_AFTER_S, LOOK_AGAIN_S, OURS_IDLE_S, WaitLimits
from services.gateway.admission.places import REFUSAL_S, PlaceLimits
from services.gateway.cluster.cluster_view import LOAD_S
from services.gateway.path.choices import Choices
from services.gateway.path.generation import AttemptFailed
from services.gateway.workers.worker_client import OutputToken, PrefillResult
from tests.unit.gateway.gateway_parts import GatewayParts, sequence
from tests.unit.gateway.scripted_worker_server import report

BLOCKS = 120  # of 16 tokens, on the decode worker
LIMITS = WaitLimits(without_room_s=30.0, without_worker_s=5.0)
FIRST_TOKEN = PrefillResult((OutputToken(0, 7),), 0, 0.0, 0.0)


class Waiting:
    """One ticket on its way: waits for a place, holds it, gives it back at `end`."""

    def __init__(self, parts: GatewayParts, ticket) -> None:
        self.parts, self.ticket = parts, ticket
        self.routed = None
        self._ending = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self.parts.queue.place(self.ticket) as self.routed:
            await self._ending.wait()

    @property
    def placed(self) -> bool:
        return self.routed is not None

    def see(self, event) -> None:
        self.parts.queue.note(self.ticket, event)

    async def end(self) -> None:
        self._ending.set()
        await self.task
        await settle()

    async def refuse(self) -> None:
        """Its decode worker has no room after all."""
        self.see(AttemptFailed(Overloaded("full"), self.routed.decode))
        await self.end()

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Line(GatewayParts):
    """P with a queue for one long prompt, and D with room for BLOCKS blocks."""

    def __init__(self, **limits) -> None:
        super().__init__(ManualClock(), waits=LIMITS, **{"places": PlaceLimits(queue_ms_max=200.0), **limits})
        self.waiters: list[Waiting] = []
        self._beats = 0

    async def report(self, blocks_free: int = BLOCKS, **changes) -> None:
        self._beats += 1
        beat = {"beat": self._beats}
        decode = report("d", "decode", blocks_total=BLOCKS, blocks_free=blocks_free, **beat, **changes)
        await self.hear(report("p", "prefill", **beat), decode)
        await settle()

    async def come(
        self, prompt_tokens: int = 16, choices: int = 1, max_tokens: int = 16, **changes
    ) -> Waiting:
        wanted = sequence(prompt_tokens, choices, max_tokens=max_tokens)
        ticket = self.ticket(wanted, cost=prompt_tokens + choices * max_tokens, **changes)
        self.waiters.append(Waiting(self, ticket))
        await settle()
        return self.waiters[-1]

    async def again(self, other: Waiting) -> Waiting:
        """The next attempt of one that was refused."""
        ticket = other.ticket.again(other.ticket.sequence)
        ticket.since, ticket.blockless_since = other.ticket.since, other.ticket.since
        self.waiters.append(Waiting(self, ticket))
        await settle()
        return self.waiters[-1]

    async def pass_time(self, seconds: float) -> None:
        """The workers report all the while, with nothing new."""
        end = self.clock.now() + seconds
        while (left := end - self.clock.now()) > 1e-9:
            self.clock.advance(min(LOOK_AGAIN_S, left))
            await settle()

    @property
    def placed(self) -> list[Waiting]:
        return [waiter for waiter in self.waiters if waiter.placed]


@pytest.fixture
async def line():
    async with a_line() as line:
        yield line


@asynccontextmanager
async def a_line(**limits):
    line = Line(**limits)
    await line.report()
    try:
        yield line
    finally:
        for waiter in line.waiters:
            await waiter.leave()
        assert len(line.queue) == 0
        assert line.queue._dispatcher is None or line.queue._dispatcher.done()
        assert len(line.places.commitments) == 0
        assert line.view.in_flight.parts == []


class TestOrder:
    async def test_a_request_that_finds_room_waits_for_nothing(self, line: Line) -> None:
        assert (await line.come()).placed
        assert line.queue._dispatcher is None

    async def test_a_worker_gets_no_prompt_while_its_queue_is_long_and_one_at_its_first_token(
        self, line: Line
    ) -> None:
        first, second = await line.come(300), await line.come(300)
        assert (first.placed, second.placed) == (True, False)
        first.see(FIRST_TOKEN)
        await settle()
        assert second.placed, "no time has passed"

    async def test_an_end_makes_room_at_once(self, line: Line) -> None:
        first = await line.come(300, max_tokens=300)
        second = await line.come(16, max_tokens=300)
        assert not second.placed
        await line.report()
        await first.end()
        assert second.placed

    async def test_a_report_that_shows_room_lets_the_next_go(self) -> None:
        line = Line()
        await line.report(blocks_free=1)
        waiting = await line.come()
        assert not waiting.placed
        await line.report()
        assert waiting.placed
        await waiting.end()

    async def test_tenants_take_turns_and_high_priority_goes_first(self, line: Line) -> None:
        running = await line.come(300)
        many = [await line.come(250, max_tokens=6, tenant="many") for _ in range(4)]
        one = await line.come(250, max_tokens=6, tenant="one")
        urgent = await line.come(250, max_tokens=6, tenant="many", priority=Priority.HIGH)
        order = []
        for _ in range(6):
            running.see(FIRST_TOKEN)
            await running.end()
            (running,) = [waiter for waiter in line.placed if not waiter.task.done()]
            order.append(running)
        assert order[0] is urgent
        assert one in order[1:3]
        assert [waiter for waiter in order if waiter in many] == many

    async def test_a_large_request_lets_others_pass_and_is_not_starved_by_them(self, line: Line) -> None:
        small = [await line.come(50, max_tokens=100) for _ in range(2)]
        large = await line.come(16 * BLOCKS - 200, max_tokens=100)
        passing = await line.come(16)
        assert (large.placed, passing.placed) == (False, True)
        await line.report(BLOCKS - 16)
        await line.pass_time(HOLD_BACK_AFTER_S)
        late = await line.come(16)
        assert not late.placed, "it would take what the large one waits for"
        for waiter in (*small, passing):
            await waiter.end()
        await line.report()
        assert large.placed
        await large.end()
        assert late.placed

    async def test_where_there_are_several_workers_one_is_kept_for_a_large_request(self, line: Line) -> None:
        def both(free: int) -> list[WorkerReport]:
            decodes = [
                report(name, "decode", blocks_total=BLOCKS, blocks_free=free, beat=beat)
                for name in ("d", "e")
            ]
            return [report("p", "prefill", beat=beat), *decodes]

        beat = 10
        await line.hear(*both(BLOCKS))
        running = [await line.come(16, max_tokens=100) for _ in range(4)]
        large = await line.come(16 * BLOCKS - 200, max_tokens=100)
        await line.pass_time(HOLD_BACK_AFTER_S)
        beat += 1
        await line.hear(*both(BLOCKS - 8))
        others = [await line.come(16, priority=p) for p in (Priority.HIGH, Priority.LOW) for _ in range(2)]
        assert all(other.placed for other in others)
        assert len({other.routed.decode.worker_id for other in others}) == 1
        for waiter in running:
            await waiter.end()
        beat += 1
        await line.hear(*both(BLOCKS))
        await line.pass_time(LOOK_AGAIN_S)
        assert large.placed
        assert large.routed.decode.worker_id != others[0].routed.decode.worker_id

    async def test_a_large_request_holds_nobody_back_from_what_other_gateways_take(self, line: Line) -> None:
        ours = await line.come(16)
        await line.report(blocks_free=20)
        large = await line.come(16 * 50)
        await line.pass_time(HOLD_BACK_AFTER_S)
        small = await line.come(16)
        await ours.end()
        await line.pass_time(OURS_IDLE_S - LOOK_AGAIN_S)
        assert not small.placed, "reports may not show yet what ours gave back"
        await line.pass_time(2 * LOOK_AGAIN_S)
        assert small.placed, "nothing that ends here would make room for the large one"
        late = await line.come(16)
        assert (late.placed, large.placed) == (False, False)
        await small.end()
        await line.report()
        assert large.placed

    async def test_an_answer_that_has_begun_goes_before_whoever_waits(self, line: Line) -> None:
        first = await line.come(300)
        older = await line.come(300)
        choices = Choices(1)
        choices.delivered[0] = [7]
        line.waiters.append(Waiting(line, line.ticket(sequence(300), choices=choices)))
        await settle()
        first.see(FIRST_TOKEN)
        await settle()
        assert (line.waiters[-1].placed, older.placed) == (True, False)

    async def test_one_that_avoids_a_worker_holds_nobody_back_from_it(self, line: Line) -> None:
        p = report("p", "prefill").key
        avoiding = await line.come(16, avoided=lambda: {p, report("d", "decode").key}, had_turn=True)
        await line.pass_time(HOLD_BACK_AFTER_S + 1)
        await line.report()
        assert not avoiding.placed
        assert (await line.come(16)).placed

    async def test_a_refused_request_finds_its_old_place_and_its_worker_is_left_alone_a_while(
        self, line: Line
    ) -> None:
        refused = await line.come(16)
        await refused.refuse()
        again, younger = await line.again(refused), await line.come(16)
        assert (again.placed, younger.placed) == (False, False)
        await line.pass_time(REFUSAL_S)
        assert again.placed
        await again.refuse()
        again = await line.again(again)
        await line.pass_time(HOLD_BACK_AFTER_S)
        assert again.placed


ANY_QUEUE = PlaceLimits(queue_ms_max=1e9)


class TestRoom:
    @pytest.fixture
    async def line(self):
        async with a_line(places=ANY_QUEUE) as line:
            yield line

    async def test_no_more_answers_run_than_their_expected_ends_leave_room_for(self, line: Line) -> None:
        """Each needs 1 block for its prompt and is expected to grow by 8. Until it is reported, its first
        one counts twice."""
        for _ in range(30):
            await line.come(16, max_tokens=128)
        assert len(line.placed) == BLOCKS // 10

    async def test_a_share_above_one_lets_more_run(self) -> None:
        async with a_line(places=replace(ANY_QUEUE, decode_share=2.0)) as line:
            for _ in range(30):
                await line.come(16, max_tokens=128)
            assert len(line.placed) == 2 * BLOCKS // 10

    async def test_choices_are_counted_each(self, line: Line) -> None:
        for _ in range(30):
            await line.come(16, choices=3, max_tokens=128)
        assert len(line.placed) == BLOCKS // (1 + 3 * 9)

    async def test_one_that_needs_more_than_there_is_runs_alone(self, line: Line) -> None:
        other = await line.come(16)
        huge = await line.come(16, choices=20, max_tokens=128)
        assert not huge.placed
        await other.end()
        await line.report()
        assert huge.placed

    async def test_requests_for_one_token_do_not_crowd_the_decode_worker(self, line: Line) -> None:
        for _ in range(50):
            one = await line.come(16, max_tokens=1)
            one.ticket.choices.deliver(OutputToken(0, 7, finish="length"))
            await one.end()
        placed = [
            waiter for waiter in [await line.come(16, max_tokens=128) for _ in range(15)] if waiter.placed
        ]
        assert len(placed) == 12, "as many as find room for nine blocks each"

    async def test_answers_that_have_grown_need_less(self, line: Line) -> None:
        running = [await line.come(16, max_tokens=128) for _ in range(12)]
        assert not (waiting := await line.come(16, max_tokens=128)).placed
        for waiter in running:
            waiter.ticket.choices.delivered[0] = [7] * 100
        await line.pass_time(0.5)
        await line.report(blocks_free=BLOCKS - 12 * 8)
        assert waiting.placed


class TestEnds:
    async def fails_with(self, waiter: Waiting, kind: type[Exception]) -> Exception:
        await asyncio.wait([waiter.task], timeout=1)
        error = waiter.task.exception()
        assert isinstance(error, kind), error
        return error

    async def test_without_any_worker_the_wait_is_short(self) -> None:
        line = Line()
        waiters = [await line.come() for _ in range(3)]
        await line.pass_time(LIMITS.without_worker_s - 0.5)
        assert not any(waiter.task.done() for waiter in waiters)
        await line.pass_time(1.0)
        for waiter in waiters:
            await self.fails_with(waiter, NoWorker)

    async def test_a_worker_that_was_there_for_a_moment_starts_that_wait_anew(self) -> None:
        line = Line()
        waiter = await line.come()
        await line.pass_time(LIMITS.without_worker_s - 0.5)
        await line.report(blocks_free=1)
        await line.pass_time(1.0)
        assert not waiter.task.done(), "it waits for room now"
        await waiter.leave()

    async def test_whoever_is_held_back_waits_for_room_and_not_for_a_worker(self, line: Line) -> None:
        await line.come(16)
        await line.report(blocks_free=4)
        large = await line.come(160)
        await line.report(blocks_free=4, state="draining")
        small = await line.come(16)
        await line.pass_time(HOLD_BACK_AFTER_S + 0.5)
        await line.report(blocks_free=4)
        await line.pass_time(LIMITS.without_worker_s)
        assert not large.task.done()
        assert not small.task.done(), "there is a worker"

    async def test_without_any_worker_the_wait_is_short_behind_a_large_request_too(self, line: Line) -> None:
        await line.report(blocks_free=4)
        large = await line.come(160)
        await line.pass_time(HOLD_BACK_AFTER_S + LOOK_AGAIN_S)
        small = await line.come(160)
        await line.report(blocks_free=4, state="draining")
        await line.pass_time(LIMITS.without_worker_s + 2 * LOOK_AGAIN_S)
        for waiter in (large, small):
            await self.fails_with(waiter, NoWorker)

    @pytest.mark.parametrize(
        "last_report",
        [
            {"blocks_free": 2, "running": 3},
            {"running": 8, "sequences_max": 8},
            {"running": 1, "waiting": 20, "sequences_max": 8},
        ],
    )
    async def test_what_a_last_report_said_closes_no_worker_while_redis_is_away(
        self, line: Line, last_report
    ) -> None:
        await line.report(**last_report)
        waiter = await line.come(400)
        line.membership.available = False
        await line.view.refresh()
        await line.pass_time(LOAD_S - 0.5)
        assert not waiter.placed
        await line.pass_time(1.0)
        assert waiter.placed

    async def test_without_room_it_ends_with_429_and_a_time(self) -> None:
        line = Line()
        await line.report(blocks_free=1)
        waiter = await line.come()
        await line.pass_time(LIMITS.without_room_s + LOOK_AGAIN_S)
        error = await self.fails_with(waiter, Overloaded)
        assert error.retry_after_s >= 1

    async def test_a_first_token_that_cannot_come_in_time_any_more_ends_it_before_that_time(
        self, line: Line
    ) -> None:
        await line.come(3000)
        waiter = await line.come(300, first_token_by=2.0, expected_ms=500.0)
        await line.pass_time(1.4)
        assert not waiter.task.done()
        await line.pass_time(0.3)
        await self.fails_with(waiter, Overloaded)
        assert line.metric("rejections_total", reason="late") == 1

    async def test_an_answer_that_has_begun_has_no_first_token_to_wait_for(self, line: Line) -> None:
        await line.come(3000)
        choices = Choices(1)
        choices.delivered[0] = [7]
        waiter = Waiting(line, line.ticket(sequence(300), choices=choices, first_token_by=1.0, deadline=2.5))
        line.waiters.append(waiter)
        await line.pass_time(2.0)
        assert not waiter.task.done()
        await line.pass_time(1.0)
        await self.fails_with(waiter, DeadlineExceeded)

    async def test_whoever_leaves_while_it_waits_takes_nothing_with_it(self, line: Line) -> None:
        running, leaving, next_one = [await line.come(300) for _ in range(3)]
        await leaving.leave()
        running.see(FIRST_TOKEN)
        await settle()
        assert next_one.placed

    async def test_whoever_leaves_when_its_turn_has_just_come_gives_the_place_to_the_next(
        self, line: Line
    ) -> None:
        running, leaving, next_one = [await line.come(300) for _ in range(3)]
        running.see(FIRST_TOKEN)
        while leaving.ticket.place is None:
            await asyncio.sleep(0)
        leaving.task.cancel()
        await settle()
        assert (leaving.placed, next_one.placed) == (False, True)

    async def test_a_bug_in_the_router_ends_the_waits_with_it(self, line: Line) -> None:
        await line.come(300)
        waiter = await line.come(300)
        line.places._options = None
        await line.pass_time(LOOK_AGAIN_S)
        await self.fails_with(waiter, AttributeError)


@pytest.mark.parametrize("seed", range(30))
async def test_whatever_happens_every_request_is_placed_refused_or_cancelled_once(seed: int) -> None:
    rng = random.Random(seed)
    async with a_line() as line:
        for _ in range(60):
            live = [waiter for waiter in line.waiters if not waiter.task.done()]
            match rng.choice(["come", "come", "come", "token", "end", "refuse", "leave", "report", "time"]):
                case "come":
                    await line.come(
                        rng.choice([16, 100, 600]),
                        choices=rng.choice([1, 1, 3]),
                        max_tokens=rng.choice([8, 128]),
                        tenant=rng.choice("abc"),
                        priority=rng.choice(list(Priority)),
                        had_turn=rng.random() < 0.2,
                        first_token_by=line.clock.now() + rng.choice([1.0, 1e6]),
                    )
                case "token" | "end" | "refuse" as what if placed := [w for w in live if w.placed]:
                    waiter = rng.choice(placed)
                    if what == "token":
                        waiter.see(FIRST_TOKEN)
                    else:
                        await (waiter.end() if what == "end" else waiter.refuse())
                case "leave" if live:
                    await rng.choice(live).leave()
                case "report":
                    await line.report(rng.randint(0, BLOCKS))
                case "time":
                    await line.pass_time(rng.choice([0.05, 0.3, 3.0]))
        waiting = {waiter.ticket for waiter in line.waiters if waiter.ticket.waiting}
        assert set(line.queue) == waiting
        for waiter in line.waiters:
            ticket = waiter.ticket
            ends = [ticket.waiting, ticket.place is not None, waiter.task.done()]
            assert sum(ends) == 1, (waiter.task, ends)
        held = [waiter for waiter in line.waiters if waiter.ticket.place is not None]
        assert len(line.places.commitments) == len(held)
