"""What the requests of configured keys use, as it happens: limits, leases, and metrics by key.

    at the door            take one request and a lease       refused before the body is read
    its prompt is tokens   take them                          refused before any other work
    every SETTLE_S         tokens of answers so far; leases renewed
    its end                tokens since then; lease given back

The counters are in Redis, for all gateways together. What this gateway takes is also counted here, and while
Redis is away that is what counts: each gateway then allows the whole limit. Tokens that could not be counted
in Redis meanwhile are not counted there later. A call that failed is followed by AWAY_S without any, so that
a Redis that hangs delays a request now and then and not each.
"""

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.core.child_tasks import ChildTasks
from services.core.clock import Clock
from services.core.errors import RateLimited, StoreUnavailable
from services.gateway.door.tenant import Tenant
from services.gateway.key_metrics import KeyMetrics
from services.keys.memory_limits import MemoryLimits
from services.keys.protocol import LEASE_S, WINDOW_S, LimitStore, Use, Verdict

logger = logging.getLogger(__name__)

SETTLE_S = LEASE_S / 3
AWAY_S = 1.0

Counter = Callable[[], int]


@dataclass(slots=True, eq=False)
class Visit:
    """One request of a tenant, from the door to its last byte."""

    tenant: Tenant
    lease: str = ""
    visits: "Visits | None" = None  # None: no keys are configured, nothing is counted
    headers: dict[str, str] = field(default_factory=dict)  # for the response: what is left of the limits
    counted: int = 0  # tokens of its answers
    _answers: list[Counter] = field(default_factory=list)

    async def take_prompt(self, tokens: int) -> None:
        """Its prompts are so many tokens. Raises RateLimited."""
        if self.visits is not None:
            await self.visits.take_prompt(self, tokens)

    def count_answer(self, tokens: Counter) -> None:
        """`tokens` says how many an answer has by now."""
        self._answers.append(tokens)

    def new_tokens(self) -> int:
        """Of its answers, since this was last asked."""
        counted, self.counted = self.counted, sum(answer() for answer in self._answers)
        return self.counted - counted


class Visits:
    def __init__(self, store: LimitStore, metrics: KeyMetrics, clock: Clock) -> None:
        self._store, self._metrics, self._clock = store, metrics, clock
        self._local = MemoryLimits(clock)
        self._running: defaultdict[Tenant, list[Visit]] = defaultdict(list)
        self._ended: defaultdict[Tenant, list[Visit]] = defaultdict(list)
        self._store_answers = True
        self._away_until = -math.inf
        self._woken = asyncio.Event()

    def of(self, tenant: Tenant, request_id: str) -> Visit:
        return Visit(tenant, request_id, self)

    async def enter(self, visit: Visit) -> None:
        """Raises RateLimited. What enters has to leave."""
        tenant = visit.tenant
        self._metrics.count_request(tenant.name)
        if tenant.limits:
            try:
                await self._take(visit, Use(requests=1, lease=visit.lease))
            except asyncio.CancelledError:  # it may have been taken
                self._end(visit)
                raise
        self._running[tenant].append(visit)

    async def take_prompt(self, visit: Visit, tokens: int) -> None:
        if visit.tenant.limits.tokens_per_minute is not None:
            await self._take(visit, Use(tokens=tokens))
        self._metrics.count_prompt(visit.tenant.name, tokens)

    def leave(self, visit: Visit) -> None:
        """Everything of it is over."""
        running = self._running[visit.tenant]
        running.remove(visit)
        if not running:
            del self._running[visit.tenant]
        self._end(visit)

    def _end(self, visit: Visit) -> None:
        self._ended[visit.tenant].append(visit)
        self._woken.set()

    async def settle_forever(self) -> None:
        """Those that ended at once, so that others may begin; those that run every SETTLE_S."""
        renewed_at = self._clock.now()
        while True:
            async with ChildTasks() as tasks:
                waits = [tasks.start(self._woken.wait()), tasks.start(self._clock.sleep(SETTLE_S))]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            self._woken.clear()
            await self.settle_ended()
            if self._clock.now() - renewed_at >= SETTLE_S:
                renewed_at = self._clock.now()
                await self.settle_running()

    async def settle_ended(self) -> None:
        """Give back leases, and count the last tokens of answers."""
        ended, self._ended = self._ended, defaultdict(list)
        for tenant, visits in ended.items():
            await self._settle(tenant, [], visits)

    async def settle_running(self) -> None:
        """Renew leases, and count what answers have by now."""
        for tenant in list(self._running):
            await self._settle(tenant, list(self._running.get(tenant, ())), [])

    async def _settle(self, tenant: Tenant, running: Sequence[Visit], ended: Sequence[Visit]) -> None:
        tokens = sum(visit.new_tokens() for visit in (*running, *ended))
        self._metrics.count_answer(tenant.name, tokens)
        limits, leased = tenant.limits, tenant.limits.concurrent is not None
        renewed, given_back = ([visit.lease for visit in some if leased] for some in (running, ended))
        counted = tokens and limits.tokens_per_minute is not None
        if not (counted or renewed or given_back):
            return
        self._local.settle_now(tenant.id, limits, tokens, renewed, given_back)
        if not self._is_away:
            with self._noting_away():
                await self._store.settle(tenant.id, limits, tokens, renewed, given_back)

    async def _take(self, visit: Visit, use: Use) -> None:
        tenant = visit.tenant
        verdict = await self._verdict(tenant, use)
        visit.headers.update(_headers(tenant, verdict))
        if verdict.refused is not None:
            self._metrics.count_rejection(tenant.name, verdict.refused)
            raise _rate_limited(tenant, use, verdict)

    async def _verdict(self, tenant: Tenant, use: Use) -> Verdict:
        """That of all gateways; while Redis is away, our own."""
        if not self._is_away:
            with self._noting_away():
                verdict = await self._store.take(tenant.id, tenant.limits, use)
                if verdict.refused is None:
                    self._local.take_now(tenant.id, tenant.limits, use, by_force=True)
                return verdict
        return self._local.take_now(tenant.id, tenant.limits, use)

    @property
    def _is_away(self) -> bool:
        return self._clock.now() < self._away_until

    @contextmanager
    def _noting_away(self) -> Iterator[None]:
        """Around a call of the store: goes on behind it if there was no answer."""
        try:
            yield
        except StoreUnavailable as error:
            if self._store_answers:
                logger.warning("each gateway counts limits of API keys alone: %s", error.message)
            self._store_answers = False
            self._away_until = self._clock.now() + AWAY_S
            return
        if not self._store_answers:
            logger.info("limits of API keys are counted together again")
        self._store_answers = True

    async def close(self) -> None:
        await self._store.close()


def _rate_limited(tenant: Tenant, use: Use, verdict: Verdict) -> RateLimited:
    """In OpenAI's words, as far as they are true here."""
    limits, retry_s = tenant.limits, max(verdict.retry_after_s, 0.001)
    asked = f", Requested {use.tokens}" if use.tokens else ""  # at the door the prompt is not known yet
    reasons = {
        "concurrent": f"requests at the same time: Limit {limits.concurrent}",
        "requests": f"requests per min (RPM): Limit {limits.requests_per_minute}",
        "tokens": f"tokens per min (TPM): Limit {limits.tokens_per_minute}{asked}",
    }
    assert verdict.refused is not None
    message = f"Rate limit reached for the API key {tenant.name} on {reasons[verdict.refused]}."
    wait = f"{retry_s:.1f}" if retry_s < 10 else f"{math.ceil(retry_s)}"
    return RateLimited(f"{message} Please try again in {wait}s.", verdict.refused, retry_s)


def _headers(tenant: Tenant, verdict: Verdict) -> dict[str, str]:
    """OpenAI's, for the limits that there are."""
    used = {
        "requests": (tenant.limits.requests_per_minute, verdict.requests_used_s),
        "tokens": (tenant.limits.tokens_per_minute, verdict.tokens_used_s),
    }
    headers = {}
    for name, (limit, used_s) in used.items():
        if limit is not None:
            left = max(0, math.floor(limit * (1 - used_s / WINDOW_S) + 1e-6))
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(left)
            headers[f"x-ratelimit-reset-{name}"] = f"{max(used_s, 0.0):.3f}s"
    return headers
