"""Limits counted in this process: the in-memory twin, and what a gateway counts by while Redis is away."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from services.core.clock import Clock
from services.core.errors import StoreUnavailable
from services.keys.api_key import KeyLimits
from services.keys.protocol import LEASE_S, WINDOW_S, Limit, Use, Verdict

CONCURRENT_RETRY_S = 1.0  # nobody knows when a request ends


@dataclass(slots=True)
class _Used:
    """The moments when the buckets will be full again, and when leases end."""

    requests: float
    tokens: float
    leases: dict[str, float] = field(default_factory=dict)


class MemoryLimits:
    def __init__(self, clock: Clock) -> None:
        self.available = True  # False: every call raises StoreUnavailable
        self._clock = clock
        self._used: dict[str, _Used] = {}

    async def take(self, key_id: str, limits: KeyLimits, use: Use) -> Verdict:
        self._require_available()
        return self.take_now(key_id, limits, use)

    async def settle(
        self, key_id: str, limits: KeyLimits, tokens: int, running: Sequence[str], ended: Collection[str]
    ) -> None:
        self._require_available()
        self.settle_now(key_id, limits, tokens, running, ended)

    async def close(self) -> None:
        pass

    def take_now(self, key_id: str, limits: KeyLimits, use: Use, *, by_force: bool = False) -> Verdict:
        """`by_force`: take it even where it is too much; it has been allowed elsewhere."""
        now, used = self._clock.now(), self._up_to_now(key_id)
        requests = used.requests + _seconds(use.requests, limits.requests_per_minute)
        tokens = used.tokens + _seconds(use.tokens, limits.tokens_per_minute)
        refused, retry_after_s = _refusal(now, limits, use, used, requests, tokens)
        if refused and not by_force:
            return Verdict(refused, retry_after_s, used.requests - now, used.tokens - now)
        used.requests, used.tokens = requests, tokens
        if use.lease:
            used.leases[use.lease] = now + LEASE_S
        return Verdict(None, 0.0, requests - now, tokens - now)

    def settle_now(
        self, key_id: str, limits: KeyLimits, tokens: int, running: Sequence[str], ended: Collection[str]
    ) -> None:
        used = self._up_to_now(key_id)
        used.tokens += _seconds(tokens, limits.tokens_per_minute)
        used.leases.update(dict.fromkeys(running, self._clock.now() + LEASE_S))
        for lease in ended:
            used.leases.pop(lease, None)

    def lose_everything(self) -> None:
        """What a restart of Redis may do."""
        self._used.clear()

    def _up_to_now(self, key_id: str) -> _Used:
        now = self._clock.now()
        used = self._used.setdefault(key_id, _Used(now, now))
        used.requests, used.tokens = max(used.requests, now), max(used.tokens, now)
        used.leases = {lease: end for lease, end in used.leases.items() if end > now}
        return used

    def _require_available(self) -> None:
        if not self.available:
            raise StoreUnavailable("the in-memory limits are switched off")


def _refusal(
    now: float, limits: KeyLimits, use: Use, used: _Used, requests: float, tokens: float
) -> tuple[Limit | None, float]:
    """`requests` and `tokens`: when the buckets would be full again."""
    if use.lease and limits.concurrent is not None and len(used.leases) >= limits.concurrent:
        return "concurrent", CONCURRENT_RETRY_S
    if limits.requests_per_minute is not None and requests - now > WINDOW_S:
        return "requests", requests - now - WINDOW_S
    # One that wants more than a minute's tokens waits for the bucket to be full.
    if limits.tokens_per_minute is not None and tokens - now > WINDOW_S and used.tokens > now:
        return "tokens", min(tokens - now - WINDOW_S, used.tokens - now)
    return None, 0.0


def _seconds(number: int, per_minute: int | None) -> float:
    """How long a bucket takes to refill by so much."""
    return number * WINDOW_S / per_minute if per_minute else 0.0
