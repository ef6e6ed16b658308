"""Several streams of events as one."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

import pytest

from services.gateway.path.merge import merged


class Streams:
    """Streams that say what has become of them."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    async def stream(self, name: str, events: Iterable[object]) -> AsyncGenerator[object, None]:
        try:
            for event in events:
                await asyncio.sleep(0)
                if isinstance(event, Exception):
                    raise event
                yield [event]
        finally:
            self.closed.append(name)

    async def hanging(self, name: str) -> AsyncGenerator[object, None]:
        try:
            yield [name]
            await asyncio.Event().wait()
        finally:
            self.closed.append(name)


async def test_all_events_come_each_stream_s_in_order() -> None:
    streams = Streams()
    together = merged(streams.stream(f"{n}", range(n, 30, 3)) for n in range(3))
    found = [event async for burst in together for event in burst]
    assert sorted(found) == list(range(30))
    assert all([n for n in found if n % 3 == rest] == list(range(rest, 30, 3)) for rest in range(3))
    assert sorted(streams.closed) == ["0", "1", "2"]


async def test_of_no_streams_nothing_comes() -> None:
    assert [burst async for burst in merged(list[AsyncGenerator[list[int], None]]())] == []


async def test_a_stream_that_fails_ends_all() -> None:
    streams = Streams()
    events = [1, ValueError("mine")]
    with pytest.raises(ValueError, match="mine"):
        _ = [burst async for burst in merged([streams.hanging("a"), streams.stream("b", events)])]
    assert sorted(streams.closed) == ["a", "b"]


async def test_closing_it_closes_every_stream() -> None:
    streams = Streams()
    async with aclosing(merged([streams.hanging("a"), streams.hanging("b")])) as bursts:
        assert set(await anext(bursts)) <= {"a", "b"}
    assert sorted(streams.closed) == ["a", "b"]
