"""One attempt's calls: prefill and decode at once, their events in one stream."""

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from services.core.child_tasks import ChildTasks
from services.core.clock import Clock
from services.core.errors import (
    DeadlineExceeded,
    DiptychError,
    EngineFailed,
    Incompatible,
    KvCorrupt,
    KvLinkLost,
    KvSourceLost,
    KvStale,
    LeaseExpired,
    PullerLost,
)
from services.core.worker_report import WorkerReport
from services.gateway.path.generation import AttemptFailed, Routed, WorkerEvent, WorkerPair
from services.gateway.path.inbox import Inbox
from services.gateway.workers.worker_client import Sequence, WorkerClient

# Errors that a decode worker reports about the prefill worker it pulls from.
_SOURCE_ERRORS = (KvSourceLost, KvLinkLost, KvCorrupt, KvStale, LeaseExpired)

Arrived = WorkerEvent | AttemptFailed | Exception


class Arrivals:
    """The events of one attempt's calls."""

    def __init__(self, inbox: Inbox[Arrived], placement: Routed) -> None:
        self._inbox, self._placement = inbox, placement

    async def take(self) -> list[WorkerEvent | AttemptFailed]:
        """What has come since the last call, once that is something. If an AttemptFailed is there, it is the
        last one that ever comes. Raises the exception of a bug."""
        burst: list[WorkerEvent | AttemptFailed] = []
        for event in await self._inbox.take():
            if isinstance(event, Exception):
                raise event
            if isinstance(event, AttemptFailed):
                return [*burst, _blame(event, self._placement)]
            burst.append(event)
        return burst


@asynccontextmanager
async def dispatched(
    workers: WorkerClient, sequence: Sequence, placement: Routed, clock: Clock, deadline: float
) -> AsyncIterator[Arrivals]:
    """Both workers are called; at the deadline the attempt fails. Leaving it cancels what still runs."""
    inbox: Inbox[Arrived] = Inbox()
    async with ChildTasks() as calls:
        if placement.prefill is not None:
            calls.start(_reporting(inbox, placement.prefill, _prefill(workers, sequence, placement, inbox)))
        if placement.decode is not None:
            decoding = workers.decode(placement.decode, sequence, placement.prefill, inbox.put)
            calls.start(_reporting(inbox, placement.decode, decoding))
        calls.start(_reporting(inbox, None, _expire(clock, deadline)))
        yield Arrivals(inbox, placement)


async def _prefill(
    workers: WorkerClient, sequence: Sequence, placement: Routed, inbox: Inbox[Arrived]
) -> None:
    assert placement.prefill is not None
    alone = placement.decode is None
    result = await workers.prefill(placement.prefill, sequence, expect_pull=not alone)
    if alone and any(first.finish is None for first in result.firsts):
        raise EngineFailed(f"{placement.prefill.worker_id} did not finish an answer of one token")
    inbox.put(result)


async def _expire(clock: Clock, deadline: float) -> None:
    await clock.sleep(max(0.0, deadline - clock.now()))
    raise DeadlineExceeded("The request took longer than this server allows (request_timeout_s).")


async def _reporting(
    inbox: Inbox[Arrived], worker: WorkerReport | None, call: Coroutine[Any, Any, None]
) -> None:
    """Turn a call's failure into an event; the exception of a bug is passed on as it is."""
    try:
        await call
    except DiptychError as error:
        inbox.put(AttemptFailed(error, worker))
    except Exception as bug:
        inbox.put(bug)


def _blame(failed: AttemptFailed, placement: Routed) -> AttemptFailed:
    """Whom to avoid next time: whoever reports that the other side is lost is not at fault. Two workers
    that did not find each other, or between which KV cannot travel, may each work with others."""
    if isinstance(failed.error, _SOURCE_ERRORS) and placement.prefill is not None:
        return AttemptFailed(failed.error, placement.prefill)
    if isinstance(failed.error, PullerLost | Incompatible) and placement.prefill and placement.decode:
        return AttemptFailed(failed.error, pair=WorkerPair(placement.prefill.key, placement.decode.key))
    return failed
