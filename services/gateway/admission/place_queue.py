"""The queue in front of the workers: who waits for a place, in which order, and for how long.

    new  ──>  fair queue  ──(its turn)──>  place
                  └─ no blocks for it ──>  aside  ──>  place       those behind it go on meanwhile
    failed attempt  ─────────────────────>  aside
    answer that has begun  ──────────────>  begun  ──>  place       always first

Whoever stands aside is tried first when anything changes. After HOLD_BACK_AFTER_S without enough free blocks
the workers that suit it best are kept for it, so that a large request does not starve among small ones; where
there are no others, nobody goes before it any more. One that avoids a worker after a failure holds nobody
back, nor does any while nothing of ours is on a worker: then no end of ours would make room for it.

Nothing here polls for its own sake: requests that come, first tokens, ends of attempts and new reports
wake the queue. A look every LOOK_AGAIN_S sees what only time changes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.core.child_tasks import ChildTasks
from services.core.clock import Clock
from services.core.errors import DeadlineExceeded, DiptychError, NoWorker, Overloaded
from services.gateway.admission.fair_queue import FairQueue, Priority
from services.gateway.admission.pace import Pace
from services.gateway.admission.places import Kept, Lack, Places
from services.gateway.admission.ticket import Ticket
from services.gateway.cluster.cluster_view import ClusterView
from services.gateway.metrics import GatewayMetrics
from services.gateway.path.generation import AttemptFailed, Event, Routed
from services.gateway.workers.worker_client import OutputToken, PrefillResult

logger = logging.getLogger(__name__)

HOLD_BACK_AFTER_S = 2.0  # until then anybody may go first, which keeps the workers busy
# Blocks that are lacking so long after our last work has ended belong to other gateways: it has been in
# several reports what ours gave back.
OURS_IDLE_S = 1.0
LOOK_AGAIN_S = 0.1
# What is cached where is asked once, when a request comes, and again after a wait of so long.
LOCATED_S = 0.3
# The router is asked for so many of those aside and those begun at each event; who is behind them waits.
TRIES_MAX = 8
ASIDE_MAX = 8  # of each class; then the class waits
RETRY_AFTER_S_MIN, RETRY_AFTER_S_MAX = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class WaitLimits:
    without_room_s: float = 120.0
    without_worker_s: float = 15.0


class PlaceQueue:
    def __init__(
        self, places: Places, view: ClusterView, limits: WaitLimits, metrics: GatewayMetrics, clock: Clock
    ) -> None:
        self._places, self._view, self._limits = places, view, limits
        self._metrics, self._clock = metrics, clock
        self._fair: FairQueue[Ticket] = FairQueue()
        self._begun: list[Ticket] = []  # these two by `since`
        self._aside: list[Ticket] = []
        self._workerless_since: float | None = None  # of the whole fair queue
        self._pace = Pace(clock)
        self._woken = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None  # while somebody waits

    def __len__(self) -> int:
        return len(self._begun) + len(self._aside) + len(self._fair)

    def __iter__(self) -> Iterator[Ticket]:
        yield from self._begun
        yield from self._aside
        yield from self._fair

    # For those who ask

    @asynccontextmanager
    async def place(self, ticket: Ticket) -> AsyncIterator[Routed]:
        """Wait for a place, and hold it. Raises Overloaded, NoWorker or DeadlineExceeded."""
        try:
            if not ticket.waiting and not ticket.over.is_set():
                await self.locate(ticket)
                self.enter(ticket)
            await ticket.over.wait()
            if ticket.error is not None:
                raise ticket.error
            assert ticket.place is not None
            if self._clock.now() - ticket.located_at > LOCATED_S:
                await self._route_again(ticket)
            yield ticket.place.routed
        finally:
            self.leave(ticket)

    async def locate(self, ticket: Ticket) -> None:
        """Ask where its tokens are cached, if whoever computes them may use that."""
        sequence = ticket.sequence
        ticket.located_at = self._clock.now()
        if sequence.sampling.prompt_logprobs is not None:
            return
        token_ids = sequence.prompt_ids + sequence.output_ids
        ticket.located = await self._view.locate(token_ids, sequence.salt)
        ticket.located_at = self._clock.now()

    def enter(self, ticket: Ticket) -> None:
        """Queue it. If there is a place for it already, it has it when this returns."""
        ticket.entered_at = self._clock.now()
        ticket.waiting = True
        if ticket.begun or ticket.had_turn:
            lane = self._begun if ticket.begun else self._aside
            lane.append(ticket)
            lane.sort(key=lambda one: one.since)
        else:
            self._fair.push(ticket)
        self._advance()
        if len(self) and (self._dispatcher is None or self._dispatcher.done()):
            self._dispatcher = asyncio.create_task(self._dispatch())

    def leave(self, ticket: Ticket) -> None:
        """It wants no place any more, or gives back the one it had."""
        if ticket.place is not None:
            self._places.give_back(ticket.place)
            ticket.place = None
        elif ticket.waiting:
            self._pace.count()
            self._remove(ticket)
            self._note_who_waits()
        self.wake()

    def note(self, ticket: Ticket, event: Event) -> None:
        """What came of its place: with the first token, its prompt is computed."""
        place = ticket.place
        assert place is not None
        if isinstance(event, AttemptFailed):
            if isinstance(event.error, Overloaded) and event.culprit is not None:
                place.refused_by = event.culprit.key
        elif isinstance(event, PrefillResult | OutputToken) and place.prompt is not None:
            seen_ms = (self._clock.now() - place.taken_at) * 1e3
            self._pace.note_first_token(place.routed.route.expected_ttft_ms, seen_ms)
            place.prompt.prefilled()
            place.prompt = None
            self.wake()

    def wake(self) -> None:
        """Something has changed; the cluster's view is fresh, for example."""
        self._woken.set()

    # What is waiting

    def length(self, priority: Priority) -> int:
        return self._fair.length(priority) + sum(one.priority is priority for one in self._apart)

    def tokens(self, priority: Priority) -> int:
        return self._fair.tokens(priority) + sum(o.cost for o in self._apart if o.priority is priority)

    def waiting(self, tenant: str | None = None) -> tuple[int, int]:
        """How many sequences wait and the tokens they want computed, all or those of one tenant."""
        these = [one for one in self if tenant is None or one.tenant == tenant]
        return sum(len(one.sequence.choices) for one in these), sum(one.cost for one in these)

    @property
    def tenants(self) -> int:
        """How many have requests here."""
        return len({one.tenant for one in self})

    def wait_s(self, ticket: Ticket) -> float:
        """How long it would wait if it came now: for all that goes before it at the pace of the queue, or for
        those of its class at the pace of the class, whatever takes longer. A class that others overtake has
        little before it that is here yet, but is slow."""
        if not len(self):
            return 0.0
        asked = ticket.priority, ticket.tenant, ticket.cost
        apart = sum(one.cost for one in self._apart)
        apart_in_class = sum(one.cost for one in self._apart if one.priority is ticket.priority)
        predicted = self._predicted_per_s(ticket)
        pace = self._pace.tokens_per_s(predicted)
        pace_of_class = self._pace.tokens_per_s_of(ticket.priority, predicted)
        return max(
            (self._fair.tokens_ahead(*asked) + apart) / pace,
            (self._fair.tokens_ahead_in_class(*asked) + apart_in_class) / pace_of_class,
        )

    def tokens_per_s(self, like: Ticket) -> float:
        """How fast the queue moves; before that was seen, by how long requests like this one take."""
        return self._pace.tokens_per_s(self._predicted_per_s(like))

    def _predicted_per_s(self, like: Ticket) -> float:
        computing = max(1, sum(r.prefills and r.state == "ready" for r in self._view.reports))
        return like.cost * computing / max(like.service_ms / 1e3, 1e-3)

    def first_token_s(self, ticket: Ticket) -> float:
        """How long after its turn its first token comes."""
        return self._pace.first_token_s(ticket.expected_ms)

    def retry_after_s(self, ticket: Ticket) -> float:
        """When somebody who cannot wait should come again."""
        return min(max(self.wait_s(ticket), RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)

    @property
    def _apart(self) -> list[Ticket]:
        return self._begun + self._aside

    # The dispatcher

    async def _dispatch(self) -> None:
        try:
            while len(self):
                self._woken.clear()
                self._end_overdue()
                self._advance()
                if len(self):
                    await self._until_woken()
        except Exception as bug:  # it must not leave anybody waiting
            logger.exception("the queue broke")
            for ticket in list(self):
                self._fail(ticket, bug)

    async def _until_woken(self) -> None:
        async with ChildTasks() as tasks:
            waits = [tasks.start(self._woken.wait()), tasks.start(self._clock.sleep(LOOK_AGAIN_S))]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)

    def _advance(self) -> None:
        """Give places to all who find one now."""
        self._pace.count()
        with self._places.at_once():
            self._serve(list(self._begun))
            while (oldest := self._holding_back()) is not None and self._try(oldest):
                pass
            if oldest is None or oldest.workerless_since is not None:  # then it waits for no blocks
                self._serve_others()
            elif (kept := self._kept_for(oldest)) is not None:
                with self._places.keeping(kept):
                    self._serve_others(oldest)
            else:
                self._note_workers()
        self._note_who_waits()

    def _serve_others(self, oldest: Ticket | None = None) -> None:
        aside = [ticket for ticket in self._aside if ticket is not oldest]
        self._serve(sorted(aside, key=lambda one: (one.priority, one.since)))
        self._serve_fairly()

    def _kept_for(self, oldest: Ticket) -> Kept:
        """The same ones for as long as they are there."""
        alive = {report.key for report in self._view.reports if report.state == "ready"}
        if not oldest.kept or not oldest.kept <= alive:
            oldest.kept = self._places.to_keep(oldest.sequence, oldest.located, oldest.avoided())
        return oldest.kept

    def _serve(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets[:TRIES_MAX]:
            self._try(ticket)
        for ticket in tickets[TRIES_MAX:]:
            ticket.workerless_since = tickets[TRIES_MAX - 1].workerless_since

    def _serve_fairly(self) -> None:
        passed_over: set[Priority] = set()
        self._workerless_since, workerless_since = None, self._workerless_since
        while (head := self._fair.head(passed_over)) is not None:
            if self._try(head):
                continue
            if head.workerless_since is not None:
                self._workerless_since = workerless_since or head.workerless_since
                return
            if head.blockless_since is None:
                return  # those behind it would wait for the same workers
            if sum(one.priority is head.priority for one in self._aside) < ASIDE_MAX:
                self._fair.take(head)
                self._aside.append(head)
                self._aside.sort(key=lambda one: one.since)
            else:
                passed_over.add(head.priority)

    def _note_workers(self) -> None:
        """There are some, although those who are held back do not ask."""
        self._workerless_since = None
        for ticket in self._aside:
            ticket.workerless_since = None

    def _holding_back(self) -> Ticket | None:
        """Who has lacked blocks for so long that nobody may go before it."""
        if self._places.idle_s > OURS_IDLE_S:
            return None
        before = self._clock.now() - HOLD_BACK_AFTER_S
        long = [t for t in self._apart if t.blockless_since is not None and t.blockless_since <= before]
        long = [ticket for ticket in long if not ticket.avoided()]
        return min(long, key=lambda ticket: (not ticket.begun, ticket.blockless_since), default=None)

    def _try(self, ticket: Ticket) -> bool:
        """Whether it has a place now."""
        found = self._places.take(ticket.sequence, ticket.choices, ticket.located, ticket.avoided())
        if isinstance(found, Lack):
            now = self._clock.now()
            ticket.workerless_since = (ticket.workerless_since or now) if found is Lack.WORKER else None
            if found is Lack.BLOCKS and ticket.blockless_since is None:
                ticket.blockless_since = now
            return False
        ticket.place = found
        self._remove(ticket, at_its_turn=True)
        ticket.over.set()
        self._note_wait(ticket)
        return True

    def _note_wait(self, ticket: Ticket) -> None:
        waited_s = self._clock.now() - ticket.entered_at
        self._metrics.queue_seconds.labels(ticket.priority.label).observe(waited_s)
        self._pace.note_place(ticket.priority, ticket.cost, others_wait=len(self) > 0)

    def _remove(self, ticket: Ticket, *, at_its_turn: bool = False) -> None:
        ticket.waiting = False
        for lane in (self._begun, self._aside):
            if ticket in lane:
                lane.remove(ticket)
                return
        if at_its_turn:
            self._fair.take(ticket)
        else:
            self._fair.remove(ticket)

    def _note_who_waits(self) -> None:
        self._pace.note_waiting(filter(self.length, Priority))

    async def _route_again(self, ticket: Ticket) -> None:
        """Its turn came long after it was asked what is cached for it."""
        await self.locate(ticket)
        assert ticket.place is not None
        ticket.place = self._places.retake(
            ticket.place, ticket.sequence, ticket.choices, ticket.located, ticket.avoided()
        )

    # Ends without a place

    def _end_overdue(self) -> None:
        self._pace.count()
        for ticket in list(self):
            error = self._overdue(ticket)
            if error is not None:
                self._fail(ticket, error)
        self._note_who_waits()

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._remove(ticket)
        ticket.error = error
        ticket.over.set()

    def _overdue(self, ticket: Ticket) -> DiptychError | None:
        """Why it must not wait any longer, if so."""
        now = self._clock.now()
        workerless_since = self._workerless_since_of(ticket)
        workerless = workerless_since is not None
        if workerless_since is not None and now - workerless_since >= self._limits.without_worker_s:
            return _no_worker()
        if ticket.begun and now >= ticket.deadline:
            return DeadlineExceeded("The request waited for a worker until its time was over.")
        waited = now - ticket.since >= self._limits.without_room_s or now >= ticket.deadline
        late = not ticket.begun and now + self.first_token_s(ticket) > ticket.first_token_by
        if not waited and not late:
            return None
        if workerless:
            return _no_worker()
        self._metrics.rejections.labels("late").inc()
        return Overloaded(
            "All workers have been busy, and the answer cannot begin in time any more. Try again later.",
            self.retry_after_s(ticket),
        )

    def _workerless_since_of(self, ticket: Ticket) -> float | None:
        tried_itself = ticket in self._begun or ticket in self._aside
        since = ticket.workerless_since if tried_itself else self._workerless_since
        return None if since is None else max(since, ticket.entered_at)


def _no_worker() -> NoWorker:
    return NoWorker("No worker can take the request now. Try again in a moment.")
