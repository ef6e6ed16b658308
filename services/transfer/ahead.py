"""Asking for the next value while the last one is worked on."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

T = TypeVar("T")


async def ahead(values: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same values; each is asked for as soon as the one before is handed out.

    An error among them is raised after the values before it. `values` are closed by the caller.
    """
    upcoming = next_of(values)
    try:
        while (value := await upcoming) is not None:
            upcoming = next_of(values)
            yield value
    finally:
        upcoming.cancel()
        await until_done(upcoming)


def next_of(values: AsyncGenerator[T, None]) -> "asyncio.Future[T | None]":
    """The next value, or None after the last one."""
    return asyncio.ensure_future(anext(values, None))


async def until_done(future: "asyncio.Future[Any]", then_cancel: bool = True) -> None:
    """Wait for the end of something that must end first, whoever cancels the waiting. How it ended is
    the business of others. A cancellation that came meanwhile is raised afterwards, if wanted."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    if not future.cancelled():
        future.exception()
    if cancelled and then_cancel:
        raise asyncio.CancelledError
