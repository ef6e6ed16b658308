"""The reading side of NIXL: one-sided reads into our pool, on a thread of their own.

A read is posted and then polled, because NIXL has no completion to wait for. Between the processes of
one machine the post itself copies the bytes (30 ms for 100 MB, outside the interpreter's lock), so it
must not run on the event loop; and a thread that polls between short sleeps costs neither a core nor
the loop's turns.

**Nothing may write to a block after its read has ended.** The only ends that prove this are

    done      NIXL says that all bytes are in place
    fenced    the agent was destroyed, with everything that could still write

Releasing a handle or removing its peer proves nothing: with UCX over TCP and a source that was stopped,
NIXL forgot the read without an error and its bytes landed when the source went on. So any failure, a
read given up for 2 s, one that takes 30 s, and 10 s in which no read got done all destroy the agent; a
new one takes its place within 20 ms and repeats what other reads were in flight, once.
Should UCX hang in that, the reads never end and their blocks stay out of use: closed, not corrupt.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import msgspec

from services.core.errors import DiptychError, KvLinkLost, TransportUnavailable
from services.transfer.ahead import until_done
from services.transfer.nixl_agent import NixlAgent, Range

_PAUSE_MIN_S, _PAUSE_MAX_S = 50e-6, 1e-3  # between polls, doubling
_GIVEN_UP_S = 2.0  # a read that nobody waits for any more
_STUCK_S = 10.0  # no read of this worker got done for so long
_ENDLESS_S = 30.0  # one read, of 64 MiB at most, while others get done
_CLOSE_S = 5.0
_PEERS_MAX = 256  # as many as gRPC connections; the least recently used go first

logger = logging.getLogger(__name__)


class RemotePool(msgspec.Struct, frozen=True):
    """A source's registered pool, as it describes it to its readers."""

    metadata: bytes
    address: int
    bytes: int


@dataclass(slots=True, eq=False)
class _Peer:
    """One life of a source's process: its agent."""

    worker_id: str
    name: str
    reads: int = 0  # in flight


@dataclass(slots=True, eq=False)
class _Read:
    worker_id: str
    pool: RemotePool
    ranges: Sequence[Range]
    done: "Future[None]" = field(default_factory=Future)
    peer: _Peer | None = None
    handle: int = 0
    posted_s: float = 0.0
    given_up_s: float | None = None
    repeated: bool = False


class NixlReader:
    """Thread-safe, for one event loop's reads. `start` first, `close` at the end."""

    def __init__(
        self,
        worker_id: str,
        memory: memoryview,
        new_agent: Callable[[str, memoryview], NixlAgent] = NixlAgent,
    ) -> None:
        """`memory` is the pool that is read into."""
        self._worker_id = worker_id
        self._memory = memory
        self._new_agent = new_agent
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._reading: list[_Read] = []
        self._peers: dict[bytes, _Peer] = {}  # by metadata, the least recently used first
        self._agent: NixlAgent | None = None
        self._progress_s = 0.0  # when a read got done last, or the first of now was posted
        self._thread = threading.Thread(target=self._run, name="nixl-reads", daemon=True)

    async def start(self) -> None:
        """Raises TransportUnavailable if NIXL does not work here."""
        self._thread.start()
        opened: Future[None] = Future()
        self._do(lambda: _settle(opened, self._open))
        try:
            await asyncio.wrap_future(opened)
        except BaseException:
            await self.close()
            raise

    async def read(self, worker_id: str, pool: RemotePool, ranges: Sequence[Range]) -> None:
        """Read `ranges` of a source's pool into ours. Raises KvLinkLost.

        Returns, raises and lets itself be cancelled only when nothing writes to the ranges any more.
        """
        if self._closing:
            raise KvLinkLost("this worker stops")
        _check_inside(ranges, pool.bytes, len(self._memory))
        read = _Read(worker_id, pool, ranges)
        done = asyncio.wrap_future(read.done)
        self._do(partial(self._begin, read))
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            self._do(lambda: self._give_up(read))
            await until_done(done, then_cancel=False)
            raise

    async def close(self) -> None:
        """Reads that are in flight fail. Should UCX hang in its end, the process ends without it."""
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, _CLOSE_S)

    def _do(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._wake.set()

    # All below runs on the thread.

    def _run(self) -> None:
        pause_s = _PAUSE_MIN_S
        while not self._closing:
            self._wake.wait(pause_s if self._reading else None)
            pause_s = _PAUSE_MIN_S if self._wake.is_set() else min(2 * pause_s, _PAUSE_MAX_S)
            self._wake.clear()
            try:
                while self._jobs:
                    self._jobs.popleft()()
                self._poll()
            except Exception as error:  # a bug of ours: whoever waits for a read must hear of its end
                logger.exception("the thread of the NIXL reads broke")
                self._fence(repr(error))
                self._wake.set()  # for the jobs behind the one that broke
        while self._jobs:
            self._jobs.popleft()()
        self._fence("this worker stops")

    def _open(self) -> NixlAgent:
        if self._agent is None:
            self._agent = self._new_agent(self._worker_id, self._memory)
        return self._agent

    def _begin(self, read: _Read) -> None:
        try:
            if self._closing:
                raise KvLinkLost("this worker stops")
            agent = self._open()
            read.peer = self._peer(agent, read)
        except (TransportUnavailable, KvLinkLost) as error:
            read.done.set_exception(KvLinkLost(error.message))
            return
        except Exception as error:
            read.done.set_exception(KvLinkLost(f"a NIXL read did not begin: {error!r}"))
            raise
        read.posted_s = time.monotonic()
        if not self._reading:
            self._progress_s = read.posted_s
        self._reading.append(read)
        try:
            read.handle = agent.post_read(read.peer.name, read.pool.address, read.ranges)
        except KvLinkLost as error:
            self._fence(error.message, culprit=read)

    def _poll(self) -> None:
        for read in list(self._reading):
            assert self._agent is not None
            try:
                if self._agent.is_done(read.handle):
                    self._finish(read)
            except DiptychError as error:
                self._fence(error.message, culprit=read)
                return
        self._fence_overdue()

    def _finish(self, read: _Read) -> None:
        self._progress_s = time.monotonic()
        self._reading.remove(read)
        assert read.peer is not None
        read.peer.reads -= 1
        read.done.set_result(None)

    def _give_up(self, read: _Read) -> None:
        read.given_up_s = time.monotonic()

    def _fence_overdue(self) -> None:
        now = time.monotonic()
        for read in self._reading:
            if read.given_up_s is not None and now - read.given_up_s > _GIVEN_UP_S:
                self._fence(f"a cancelled read has not ended for {_GIVEN_UP_S:g} s", culprit=read)
                return
            if now - read.posted_s > _ENDLESS_S:
                self._fence(f"a read has not ended for {_ENDLESS_S:g} s", culprit=read)
                return
        if self._reading and now - self._progress_s > _STUCK_S:
            self._fence(f"no read got done for {_STUCK_S:g} s")

    def _fence(self, reason: str, culprit: _Read | None = None) -> None:
        """Destroy the agent: none of the reads in flight writes any more. They have failed, but those that
        did nothing wrong are begun again."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self._peers.clear()
        stopped, self._reading = self._reading, []
        for read in stopped:
            if culprit in (None, read) or read.repeated or read.given_up_s is not None:
                read.done.set_exception(KvLinkLost(f"a NIXL read was broken off: {reason}"))
            else:
                read.repeated = True
                self._do(partial(self._begin, read))
        if stopped:
            logger.warning("NIXL starts anew with %d reads in flight: %s", len(stopped), reason)

    def _peer(self, agent: NixlAgent, read: _Read) -> _Peer:
        """The peer to read from, connected, with this read counted."""
        metadata = read.pool.metadata
        peer = self._peers.pop(metadata, None) or _Peer(read.worker_id, agent.add_peer(metadata))
        self._peers[metadata] = peer
        peer.reads += 1
        self._remove_peers(agent)
        return peer

    def _remove_peers(self, agent: NixlAgent) -> None:
        """Those whose process has a successor, and the oldest beyond the bound; never one in use."""
        newest = {peer.worker_id: peer for peer in self._peers.values()}
        surplus = len(self._peers) - _PEERS_MAX
        for metadata, peer in list(self._peers.items()):
            if peer.reads == 0 and (surplus > 0 or newest[peer.worker_id] is not peer):
                surplus -= 1
                del self._peers[metadata]
                agent.remove_peer(peer.name)


def _check_inside(ranges: Sequence[Range], remote_bytes: int, local_bytes: int) -> None:
    """A source's mistake must not become a write outside our pool. Raises KvLinkLost."""
    for one in ranges:
        if one.remote < 0 or one.local < 0 or one.remote_end > remote_bytes or one.local_end > local_bytes:
            raise KvLinkLost(f"{one} lies outside of the pools")


def _settle(future: "Future[None]", job: Callable[[], object]) -> None:
    try:
        job()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(None)
