"""Leases: the right of one transfer to read one sequence's blocks on the worker that computed them.

Most leases are of a prefill, and what they let read grows with it. A loan is the lease of a prefix that
lies in the cache: complete from the start, and with an end that no reader can put off.

A lease is open from the prefill's start until exactly one of

    released   the puller has read everything and says so: the only end that makes the KV valid
    stale      a block was reused under it (by its generation): a fault of ours, found before harm
    expired    nobody held it for the time to live, or a loan's time was over
    failed     the prefill was cancelled or broke

While a Run or Pull call is open it holds the lease, which then cannot expire. The table lives in the
worker's event loop: expiry and "valid" are decided there, one after the other, and only afterwards
does `on_end` let the engine reuse the blocks. Whoever asks about an ended lease hears "not valid".
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from services.core.clock import Clock
from services.core.errors import DiptychError, KvSourceLost, KvStale, Overloaded, WorkerLost
from services.core.logprobs import PromptLogprobs
from services.transfer.protocol import FirstToken

# A loan keeps blocks from being evicted for others. A gigabyte takes a second or two; a reader that needs
# longer than this would have computed the prefix by now.
LOAN_S = 20.0
LOANS_MAX = 16
# Of so many ended leases a pull that comes again is refused at once; older ones it would wait for in vain.
ENDED_REMEMBERED = 1024

LeaseEnd = Literal["released", "stale", "expired", "failed"]


class Lease:
    """One transfer's view of its prefill: what may be read, and what came out."""

    def __init__(self, transfer_id: str, tokens: int, generation: Callable[[int], int]) -> None:
        self.transfer_id = transfer_id
        self._generation = generation
        self._generations: list[int] = []  # of block_ids, when each was given to the lease
        self.tokens = tokens  # of the prompt (with what earlier attempts delivered)
        self.block_ids: list[int] = []
        self.computed = 0  # the KV of all tokens before this may be read
        self.cached_tokens = 0
        self.queue_ms = 0.0
        self.fetched_tokens = 0  # from another worker's cache, before the prefill
        self.fetch_ms = 0.0
        self.complete = False  # the KV of all its tokens may be read
        self.complete_at_s = 0.0
        self.firsts: list[FirstToken] = []  # one of each choice, once the prefill has ended
        self.prompt_logprobs: list[PromptLogprobs] = []  # parts, in order, if they were asked for
        self.error: DiptychError | None = None
        self.holders = 0
        self.expires_at_s = 0.0  # means something only while nobody holds it
        self.ends_at_s = math.inf  # whoever holds it
        self.pulled = False
        self._changed = asyncio.Event()

    def admitted(self, block_ids: list[int], cached_tokens: int, queue_ms: float) -> None:
        self._give(block_ids)
        self.cached_tokens = self.computed = cached_tokens
        self.queue_ms = queue_ms
        self._notify()

    def fetched(self, tokens: int, ms: float) -> None:
        """For the record: what was fetched is reported as computed, by `advanced`."""
        self.fetched_tokens, self.fetch_ms = tokens, ms

    def advanced(self, computed: int, block_ids: list[int]) -> None:
        self.computed = computed
        self._give(block_ids)
        self._notify()

    def unchanged(self, blocks: slice = slice(None)) -> bool:
        """Whether these of its blocks still hold what they held when the lease got them."""
        now = [self._generation(block) for block in self.block_ids[blocks]]
        return now == self._generations[blocks]

    def finished(self, first: FirstToken, at_s: float) -> None:
        """The prefill has ended with the first token of a choice. Those of all choices come in one turn of
        the event loop, so whoever waits sees all of them."""
        self.firsts.append(first)
        self._completed(at_s)

    def lent(self, block_ids: list[int], tokens: int, at_s: float) -> None:
        self._give(block_ids)
        self.tokens = self.computed = tokens
        self._completed(at_s)

    def failed(self, error: DiptychError) -> None:
        self.error = self.error or error
        self._notify()

    def opened_by_puller(self) -> None:
        self.pulled = True
        self._notify()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a change that makes `condition` true. Raises the lease's error if it fails first."""
        while not condition():
            if self.error:
                raise self.error
            await self._changed.wait()

    def _completed(self, at_s: float) -> None:
        self.complete = True
        self.complete_at_s = at_s
        self._notify()

    def _give(self, block_ids: list[int]) -> None:
        new = block_ids[len(self.block_ids) :]
        self._generations += [self._generation(block) for block in new]
        self.block_ids = block_ids

    def _notify(self) -> None:
        """Wake everyone who waits now; later waiters wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()


class LeaseTable:
    def __init__(
        self,
        clock: Clock,
        ttl_s: float,
        on_end: Callable[[str, LeaseEnd], None],
        generation: Callable[[int], int] = lambda block: 0,
    ) -> None:
        """`on_end(transfer_id, how)` is called once for every lease, when its blocks may be reused.
        `generation(block)` changes whenever a block is reused (PoolMemory.generation)."""
        self._generation = generation
        self._clock = clock
        self._ttl_s = ttl_s
        self._on_end = on_end
        self._leases: dict[str, Lease] = {}
        self._ended: dict[str, DiptychError] = {}  # why there is nothing to read; oldest first
        self._parked: dict[str, list[asyncio.Future[Lease]]] = {}

    @property
    def open_leases(self) -> int:
        return len(self._leases)

    def open(self, transfer_id: str, tokens: int) -> Lease:
        assert transfer_id not in self._leases, f"transfer {transfer_id} opened twice"
        lease = self._leases[transfer_id] = Lease(transfer_id, tokens, self._generation)
        self._ended.pop(transfer_id, None)
        lease.expires_at_s = self._clock.now() + self._ttl_s
        for waiter in self._parked.pop(transfer_id, []):
            if not waiter.done():
                waiter.set_result(lease)
        return lease

    def open_loan(self, transfer_id: str) -> Lease:
        """Raises Overloaded while there are too many."""
        if sum(lease.ends_at_s < math.inf for lease in self._leases.values()) >= LOANS_MAX:
            raise Overloaded(f"the worker lends {LOANS_MAX} prefixes already")
        lease = self.open(transfer_id, 0)
        lease.ends_at_s = self._clock.now() + LOAN_S
        return lease

    def knows(self, transfer_id: str) -> bool:
        return transfer_id in self._leases

    async def find(self, transfer_id: str, wait_s: float) -> Lease:
        """The lease of a transfer. A pull that comes before its prefill is parked for `wait_s`."""
        if lease := self._leases.get(transfer_id):
            return lease
        if transfer_id in self._ended:
            raise self._ended[transfer_id]
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._parked.setdefault(transfer_id, []).append(waiter)
        try:
            async with asyncio.timeout(wait_s):
                return await waiter
        except TimeoutError:
            raise KvSourceLost(f"no prefill for transfer {transfer_id} came within {wait_s:g} s") from None
        finally:
            self._unpark(transfer_id, waiter)

    @contextmanager
    def hold(self, lease: Lease) -> Iterator[None]:
        """Keep the lease from expiring while a call works with it."""
        lease.holders += 1
        try:
            yield
        finally:
            lease.holders -= 1
            lease.expires_at_s = self._clock.now() + self._ttl_s

    def release(self, transfer_id: str) -> bool:
        """The puller is done. True: the lease was held until this moment.

        A puller that is done before the prefill is has given up: nobody needs the prefill any more.
        """
        lease = self._leases.get(transfer_id)
        if lease is None:
            return False
        if self._is_due(lease):
            self._end(lease, "expired")
            return False
        if not lease.complete:
            self.fail(lease, Overloaded("the decode worker gave the transfer up"))
            return False
        if not lease.unchanged():
            self.end_stale(lease)
            return False
        self._end(lease, "released")
        return True

    def end_stale(self, lease: Lease) -> None:
        """A block of the lease was reused: nothing that was read under it is valid."""
        if lease.transfer_id in self._leases:
            self._end(lease, "stale")
            lease.failed(KvStale(f"a KV block of transfer {lease.transfer_id} was reused under its lease"))

    def fail(self, lease: Lease, error: DiptychError) -> None:
        """The prefill broke: wake everyone with `error` and free the blocks. Harmless if it has ended."""
        lease.failed(error)
        if lease.transfer_id in self._leases:
            self._end(lease, "failed")

    def fail_all(self, error: DiptychError) -> None:
        """Fail every lease, and every pull that waits for one."""
        for lease in list(self._leases.values()):
            self.fail(lease, error)
        for waiter in [waiter for waiters in self._parked.values() for waiter in waiters]:
            if not waiter.done():
                waiter.set_exception(error)

    def fail_unfinished(self, error: DiptychError) -> int:
        """Fail the leases whose prefill still runs; how many. Computed KV stays for its readers."""
        unfinished = [lease for lease in self._leases.values() if not lease.complete]
        for lease in unfinished:
            self.fail(lease, error)
        return len(unfinished)

    def expire_due(self) -> None:
        for lease in [lease for lease in self._leases.values() if self._is_due(lease)]:
            self._end(lease, "expired")
            lease.failed(WorkerLost(f"the lease of transfer {lease.transfer_id} expired"))

    async def expire_forever(self) -> None:
        while True:
            await self._clock.sleep(self._ttl_s / 4)
            self.expire_due()

    def _is_due(self, lease: Lease) -> bool:
        now = self._clock.now()
        return now >= lease.ends_at_s or (lease.holders == 0 and now >= lease.expires_at_s)

    def _end(self, lease: Lease, how: LeaseEnd) -> None:
        del self._leases[lease.transfer_id]
        why = lease.error or KvSourceLost(f"the lease of transfer {lease.transfer_id} has ended: {how}")
        self._ended[lease.transfer_id] = why
        if len(self._ended) > ENDED_REMEMBERED:
            del self._ended[next(iter(self._ended))]
        self._on_end(lease.transfer_id, how)

    def _unpark(self, transfer_id: str, waiter: asyncio.Future[Lease]) -> None:
        waiters = self._parked.get(transfer_id, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters:
            self._parked.pop(transfer_id, None)
