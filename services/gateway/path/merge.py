"""Several streams of events as one."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TypeVar

from services.core.child_tasks import ChildTasks

T = TypeVar("T")


async def merged(streams: Iterable[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What all `streams` give, as it comes, until all have ended. Closing it closes them.

    Raises what the first of them to fail raised. It holds what nobody has taken yet, so the streams
    must have bounds of their own.
    """
    inbox: asyncio.Queue[tuple[T, ...] | Exception] = asyncio.Queue()  # an empty tuple: one has ended
    async with ChildTasks() as pumps:
        running = len([pumps.start(_pump(stream, inbox)) for stream in streams])
        while running:
            arrived = await inbox.get()
            if isinstance(arrived, Exception):
                raise arrived
            for event in arrived:
                yield event
            running -= not arrived


async def _pump(stream: AsyncGenerator[T, None], inbox: "asyncio.Queue[tuple[T, ...] | Exception]") -> None:
    try:
        async with aclosing(stream) as events:
            async for event in events:
                inbox.put_nowait((event,))
        inbox.put_nowait(())
    except Exception as error:
        inbox.put_nowait(error)
