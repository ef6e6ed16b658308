"""Where keys are kept, and where what they used is counted. Each has real implementations and a twin."""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, Protocol

from services.keys.api_key import ApiKey, KeyLimits

Keys = tuple[ApiKey, ...]
KEYS_MAX = 10_000  # 4 MB of records: read and checked in some 20 ms, whenever they change

NOTHING_KEPT = ""  # the version of a store that no key was ever written to, or that has lost them


class Kept(NamedTuple):
    version: str
    keys: Keys


class KeyStore(Protocol):
    """All keys are one document, read and replaced as a whole."""

    async def read(self, unless: str | None = None) -> Kept | None:
        """The keys; None if they are still those of the version `unless`.

        Raises StoreUnavailable, and ConfigError for a document that cannot be understood.
        """
        ...

    async def write(self, keys: Keys, after: str) -> bool:
        """Replace the version `after`. False: somebody else did it first, nothing was written."""
        ...

    async def close(self) -> None: ...


# A gateway renews the leases of its running requests every LEASE_S / 3. One that was killed holds its keys'
# places for so long.
LEASE_S = 9.0
WINDOW_S = 60.0  # what may be used at once is what comes back in this time

Limit = Literal["requests", "tokens", "concurrent"]


class Use(NamedTuple):
    """What a request wants of its key's limits."""

    requests: int = 0
    tokens: int = 0
    lease: str = ""  # names it among those that run; empty: it runs already


class Verdict(NamedTuple):
    refused: Limit | None
    retry_after_s: float  # if refused: not before that
    requests_used_s: float  # of WINDOW_S, how much of each limit is used up
    tokens_used_s: float  # above WINDOW_S: answers were longer than what was left


class LimitStore(Protocol):
    """What keys have used of their limits.

    Requests and tokens are token buckets (as in GCRA, ITU-T I.371, a bucket is one moment: when it will be
    full again): a minute's worth at most, refilled all the time. In any 60 s a key may so use twice its limit
    after a pause, and its limit on average. A request that wants more tokens than a minute has is let in when
    the bucket is full, and its rest is a debt; so are the tokens of answers, which are counted as they come.
    """

    async def take(self, key_id: str, limits: KeyLimits, use: Use) -> Verdict:
        """Take all of `use`, or nothing of it if that is refused. Raises StoreUnavailable."""
        ...

    async def settle(
        self, key_id: str, limits: KeyLimits, tokens: int, running: Sequence[str], ended: Collection[str]
    ) -> None:
        """Count tokens that were used; renew the leases of `running`, give back those of `ended`."""
        ...

    async def close(self) -> None: ...
