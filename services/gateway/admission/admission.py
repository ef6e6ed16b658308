"""Who is let in. Whoever is not gets 429 before any work is done for it, and is told when to come again.

Each limit has a message and a `reason` label of its own:

    requests   too many requests in this gateway, running ones included: its memory
    length     too many wait, or too many of one tenant
    tokens     what waits would take too long to compute, or one tenant's part of it
    decode     the answers of all that run and wait would need many times the KV that there is
    deadline   the first token would come too late (early rejection); an idle cluster refuses nobody
    late       it was let in, but its turn came too late (place_queue.py)
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from router.state import Route
from services.core.clock import Clock
from services.core.errors import Overloaded
from services.gateway.admission.door_shares import DoorShares
from services.gateway.admission.place_queue import RETRY_AFTER_S_MAX, RETRY_AFTER_S_MIN, PlaceQueue
from services.gateway.admission.places import Places
from services.gateway.admission.ticket import Ticket
from services.gateway.cluster.cluster_view import ClusterView
from services.gateway.metrics import GatewayMetrics

# Predictions are off by some. Who is let in with an expected wait up to its very deadline misses it as often
# as not, and has taken the place of somebody who would not have.
DEADLINE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    requests_max: int = 1024  # in the gateway
    length_max: int = 512  # in the queue, choices counted
    tokens_max: int = 1 << 20  # that those in the queue want computed
    tenant_share: float = 0.5  # of both, for one tenant
    decode_pools_max: float = 16.0  # KV of all answers, running and waiting, in pools of all decode workers


class Admission:
    def __init__(
        self,
        limits: AdmissionLimits,
        queue: PlaceQueue,
        places: Places,
        view: ClusterView,
        metrics: GatewayMetrics,
        clock: Clock,
    ) -> None:
        self._limits = limits
        self._queue, self._places, self._view = queue, places, view
        self._metrics = metrics
        self._inflight = 0
        self._shares = DoorShares(clock)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the gateway's places for requests. Raises Overloaded when all are taken."""
        if self._inflight >= self._limits.requests_max:
            message = "The server has as many requests as it can take."
            self._refuse("requests", message, RETRY_AFTER_S_MIN)
        self._inflight += 1
        self._metrics.inflight.set(self._inflight)
        try:
            yield
        finally:
            self._inflight -= 1
            self._metrics.inflight.set(self._inflight)

    async def admit(self, ticket: Ticket) -> None:
        """Put it in the queue, which may give it a place at once. Raises Overloaded."""
        await self._queue.locate(ticket)
        ideal = self.estimate(ticket)
        if len(self._queue):
            self._check_length(ticket)
            self._check_tokens(ticket)
            self._check_decode(ticket)
        self._check_deadline(ticket, ideal)
        self._shares.note(ticket.priority, ticket.tenant, ticket.cost, let_in=True)
        self._queue.enter(ticket)

    def estimate(self, ticket: Ticket) -> Route | None:
        """Fill in its cost. Where it would go if all had room; None if no live worker could take it."""
        sequence = ticket.sequence
        answers = len(sequence.choices) * self._places.lengths.expected(sequence.tokens_left)
        ideal = self._places.ideal(sequence, ticket.located)
        if ideal is None:
            ticket.cost = sequence.known_tokens + answers
        else:
            first = ideal.computes
            ticket.cost = max(1, sequence.known_tokens - first.ready_tokens) + answers
            ticket.service_ms = first.fetch_ms + first.prefill_ms
            ticket.expected_ms = ideal.expected_ttft_ms
        return ideal

    def _check_length(self, ticket: Ticket) -> None:
        most, new = self._limits.length_max, len(ticket.sequence.choices)
        waiting, tokens = self._queue.waiting()
        each_s = tokens / waiting / self._queue.tokens_per_s(ticket)
        if waiting + new > most:
            message = "Too many requests wait for this server."
            self._refuse("length", message, (waiting + new - most) * each_s)
        own, _ = self._queue.waiting(ticket.tenant)
        if own + new > most * self._limits.tenant_share:
            message = "Too many requests of this API key wait for this server."
            self._refuse("length", message, self._queue.tenants * each_s)

    def _check_tokens(self, ticket: Ticket) -> None:
        most, rate = self._limits.tokens_max, self._queue.tokens_per_s(ticket)
        excess = float(self._queue.waiting()[1] + ticket.cost - most)
        if excess > 0:
            self._refuse("tokens", "Requests of too many tokens wait for this server.", excess / rate)
        excess = self._queue.waiting(ticket.tenant)[1] + ticket.cost - most * self._limits.tenant_share
        if excess > 0:
            message = "Requests of too many tokens of this API key wait for this server."
            self._refuse("tokens", message, excess * self._queue.tenants / rate)

    def _check_decode(self, ticket: Ticket) -> None:
        decoding = [report for report in self._view.reports if report.decodes]
        pool = sum(report.blocks_total * report.compatibility.block_size for report in decoding)
        if not pool:
            return
        waiting = sum(self._places.kv_tokens(one.sequence) for one in (*self._queue, ticket))
        excess = self._places.promised_tokens + waiting - pool * self._limits.decode_pools_max
        if excess > 0:
            message = "The answers that this server has promised need all its KV memory for long."
            self._refuse("decode", message, excess / self._queue.tokens_per_s(ticket))

    def _check_deadline(self, ticket: Ticket, ideal: Route | None) -> None:
        """Not of one that goes to an idle worker: nothing would be faster."""
        if ideal is None or (ideal.computes.queue_ms == 0.0 and not len(self._queue)):
            return
        expected_s = self._queue.wait_s(ticket) + self._queue.first_token_s(ticket)
        allowed_s = (ticket.first_token_by - ticket.since) * DEADLINE_SHARE
        allowed_s *= self._shares.share(ticket.priority, ticket.tenant)
        if expected_s > allowed_s:
            self._shares.note(ticket.priority, ticket.tenant, ticket.cost, let_in=False)
            message = f"The answer would begin in about {expected_s:.1f} s, later than it may."
            self._refuse("deadline", message, expected_s - allowed_s)

    def _refuse(self, reason: str, message: str, retry_after_s: float) -> NoReturn:
        self._metrics.rejections.labels(reason).inc()
        seconds = math.ceil(min(max(retry_after_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX))
        raise Overloaded(f"{message} Try again in {seconds} s.", seconds)
