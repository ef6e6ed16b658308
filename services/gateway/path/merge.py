"""Several streams of bursts as one. A burst is what came together: a list that is not empty."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TypeVar

from services.core.child_tasks import ChildTasks
from services.gateway.path.inbox import Inbox

T = TypeVar("T")


async def merged(streams: Iterable[AsyncGenerator[list[T], None]]) -> AsyncGenerator[list[T], None]:
    """What all `streams` give, as it comes, until all have ended. Closing it closes them.

    Raises what the first of them to fail raised. It holds what nobody has taken yet, so the streams
    must have bounds of their own.
    """
    inbox: Inbox[list[T] | Exception] = Inbox()  # an empty list: one has ended
    async with ChildTasks() as pumps:
        running = len([pumps.start(_pump(stream, inbox)) for stream in streams])
        while running:
            burst: list[T] = []
            for arrived in await inbox.take():
                if isinstance(arrived, Exception):
                    raise arrived
                burst += arrived
                running -= not arrived
            if burst:
                yield burst


async def _pump(stream: AsyncGenerator[list[T], None], inbox: Inbox[list[T] | Exception]) -> None:
    try:
        async with aclosing(stream) as bursts:
            async for burst in bursts:
                inbox.put(burst)
        inbox.put([])
    except Exception as error:
        inbox.put(error)
