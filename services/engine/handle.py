"""The I/O process's side of the engine: starts it, sends commands, hands out its events.

Sequences register a listener; every event of a report goes to the listener of its sequence, on the
event loop, in order. When the engine dies every listener gets a Refused with `engine_failed`, once.

The engine reports after every step, answers a Ping between two, and says before a long step how long it
will be silent. When it says nothing for much longer than that, it is `overdue`: every listener gets a
Stalled and gives its sequence up, and nothing new is taken until the engine reports again. The Drops
wait in the socket, so the engine frees everything when it goes on. If it does not, it is killed.
"""

import asyncio
import logging
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from services.core.clock import Clock
from services.core.errors import (
    FACTS,
    BadRequest,
    DiptychError,
    EngineFailed,
    EngineStalled,
    ModelFileError,
    Overloaded,
)
from services.core.parent_death import dying_with_parent
from services.engine.messages import (
    Admitted,
    Advanced,
    Command,
    Drop,
    EngineReady,
    EngineSetup,
    Failed,
    Gauges,
    Lend,
    Ping,
    Refused,
    Report,
    Revoked,
    Scored,
    Submit,
    Token,
)
from services.engine.pipe import Unframer, frame


@dataclass(frozen=True, slots=True)
class Stalled:
    """The engine is overdue. It still has the sequence: the listener is to drop it."""

    seq_id: str
    error: DiptychError


Event = Admitted | Advanced | Scored | Token | Revoked | Failed | Refused | Stalled
Listener = Callable[[Event], None]
_STOP_GRACE_S = 5.0
_PING_S = 0.25
# Of the silence that the engine has announced: after so many times it is overdue, or hung.
_OVERDUE_STEPS = 4
_HUNG_STEPS = 10

logger = logging.getLogger(__name__)


class EngineHandle:
    """`on_report` sees every report after the listeners did (for the index, metrics, membership)."""

    def __init__(self, sequences_max: int, on_report: Callable[[Report], None], clock: Clock) -> None:
        self._sequences_max = sequences_max
        self._on_report = on_report
        self._clock = clock
        self._listeners: dict[str, Listener] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Report)
        self._ready: asyncio.Future[bytes]  # the first message
        self.gauges = Gauges()
        self.gauges_at = clock.now()  # when the engine said so
        self._silent_s = 0.0  # since the last report
        self._silence_s = 0.0  # that it announced
        self.overdue = False
        self.failed = asyncio.Event()  # the engine process has ended unasked
        self.idle = asyncio.Event()  # no sequence is open
        self.idle.set()

    async def start(self, setup: EngineSetup) -> None:
        """Start the process and wait until it has loaded the model. Raises ModelFileError or EngineFailed."""
        ours, theirs = socket.socketpair()
        pool_fd = os.memfd_create("diptych-kv")  # anonymous: no name to leak, no /dev/shm size limit
        os.ftruncate(pool_fd, setup.geometry.shared_bytes)
        self.pool = memoryview(mmap.mmap(pool_fd, setup.geometry.shared_bytes))
        fds = (theirs.fileno(), pool_fd)
        command = [sys.executable, "-m", "services.engine.process", *map(str, fds)]
        self._process = await asyncio.create_subprocess_exec(
            *dying_with_parent(command, signal.SIGKILL), pass_fds=fds, env=_environment(setup.threads)
        )
        theirs.close()
        os.close(pool_fd)
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._pipe, _ = await loop.create_unix_connection(
            lambda: _Reports(self._heard, self._lost), sock=ours
        )
        self._pipe.write(frame(msgspec.msgpack.encode(setup)))
        await self._wait_ready()

    @property
    def sequences(self) -> int:
        return len(self._listeners)

    def knows(self, seq_id: str) -> bool:
        return seq_id in self._listeners

    def submit(self, submit: Submit | Lend, listener: Listener) -> None:
        """Hand a sequence to the engine. Raises Overloaded beyond the bound, EngineFailed if it is gone,
        EngineStalled while it is overdue, BadRequest if the sequence is here already."""
        if self.failed.is_set():
            raise EngineFailed("the worker's engine has died")
        if self.overdue:
            raise _stalled()
        if submit.seq_id in self._listeners:
            raise BadRequest(f"attempt {submit.seq_id} is running already", "attempt")
        if len(self._listeners) >= self._sequences_max:
            raise Overloaded("the worker's queue is full")
        self._listeners[submit.seq_id] = listener
        self.idle.clear()
        self.send(submit)

    def send(self, command: Command) -> None:
        self._pipe.write(frame(self._encoder.encode(command)))

    def drop(self, seq_id: str) -> None:
        """End a sequence, in whatever state; its listener hears nothing more. Harmless if it has ended."""
        if self._close(seq_id):
            self.send(Drop(seq_id))

    def forget(self, seq_id: str) -> None:
        """The engine has finished the sequence by itself: there is nothing to drop."""
        self._close(seq_id)

    async def watch(self, overdue_s: float, hung_s: float, on_overdue: Callable[[bool], None]) -> None:
        """Find an engine that says nothing for `overdue_s` and four times what it announced, and kill it
        after `hung_s` and ten times that: its end is then noticed like any other. `on_overdue` is told
        when the engine becomes overdue (True) and when it is back (False)."""
        tick_s = min(_PING_S, overdue_s / 4)
        while not self.failed.is_set():
            self.send(Ping())
            asked_s = self._clock.now()
            await self._clock.sleep(tick_s)
            # A tick that takes longer tells of this process, which stood still itself, not of the engine.
            self._silent_s += min(self._clock.now() - asked_s, 2 * tick_s)
            if self._silent_s > max(hung_s, _HUNG_STEPS * self._silence_s):
                logger.error("the engine has said nothing for %.1f s and is killed", self._silent_s)
                self.kill()
                return
            overdue = self._silent_s > max(overdue_s, _OVERDUE_STEPS * self._silence_s)
            if overdue != self.overdue:
                self._become(overdue)
                on_overdue(overdue)

    def kill(self) -> None:
        self._process.kill()

    def _become(self, overdue: bool) -> None:
        self.overdue = overdue
        if not overdue:
            logger.warning("the engine is back")
            return
        logger.error("the engine has said nothing for %.1f s and is overdue", self._silent_s)
        for seq_id, listener in list(self._listeners.items()):
            listener(Stalled(seq_id, _stalled()))

    async def stop(self) -> None:
        """End the process: at once if idle, else after the running step."""
        self._pipe.close()
        try:
            async with asyncio.timeout(_STOP_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _close(self, seq_id: str) -> bool:
        """Forget a sequence's listener. False: it was closed before."""
        known = self._listeners.pop(seq_id, None) is not None
        if not self._listeners:
            self.idle.set()
        return known

    async def _wait_ready(self) -> None:
        try:
            ready = msgspec.msgpack.decode(await self._ready, type=EngineReady)
        except EOFError:
            raise EngineFailed(
                f"the engine process ended with code {await self._process.wait()} while it loaded the model"
            ) from None
        if ready.error:
            raise ModelFileError(ready.error)

    def _heard(self, message: bytes) -> None:
        if self._ready.done():
            self._dispatch(self._decoder.decode(message))
        else:
            self._ready.set_result(message)

    def _lost(self) -> None:
        if self._ready.done():
            self._fail_all()
        else:
            self._ready.set_exception(EOFError())

    def _fail_all(self) -> None:
        self.failed.set()
        label = FACTS[EngineFailed].label
        for seq_id, listener in list(self._listeners.items()):
            self._close(seq_id)
            listener(Refused(seq_id, label, "the worker's engine has died"))

    def _dispatch(self, report: Report) -> None:
        self._silent_s, self._silence_s = 0.0, report.silence_s
        self.gauges, self.gauges_at = report.gauges, self._clock.now()
        events: list[Event] = [*report.admitted, *report.advanced, *report.scored, *report.tokens]
        for event in (*events, *report.revoked, *report.failed, *report.refused):
            if listener := self._listeners.get(event.seq_id):
                if isinstance(event, Refused):
                    self._close(event.seq_id)
                listener(event)
        self._on_report(report)


class _Reports(asyncio.Protocol):
    """What comes through the pipe: each message is handed on at once, without a task in between."""

    def __init__(self, take: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._take, self._lost = take, lost
        self._unframer = Unframer()

    def data_received(self, data: bytes) -> None:
        for message in self._unframer.feed(data):
            self._take(message)

    def connection_lost(self, error: Exception | None) -> None:
        """Also after an exception in `data_received`, which the event loop logs."""
        self._lost()


def _stalled() -> EngineStalled:
    return EngineStalled("the worker's engine is overdue")


def _environment(threads: int) -> dict[str, str]:
    """For the engine's process. OpenMP threads that spin while they wait would take the cores from the
    neighbours' engines: two threads each on two cores were 20 times slower in a probe."""
    defaults = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return {**defaults, **os.environ}
