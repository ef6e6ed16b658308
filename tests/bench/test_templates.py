"""The pure parts of the benchmark of chat templates."""

import asyncio
import time

from tests.bench.templates import CHATS, Times, standstill_ms


def test_chats_are_as_long_as_their_names_say() -> None:
    lengths = [sum(len(message["content"]) for message in chat.messages) for chat in CHATS.values()]
    assert lengths == [300, 20_000, 2048 * 4000, 8_000_000]


def test_times_are_milliseconds() -> None:
    assert Times.of([0.001] * 99 + [0.5]).p50 == 1.0


async def test_a_standstill_is_the_time_for_which_nothing_else_ran() -> None:
    async def work() -> None:
        await asyncio.sleep(0.01)
        time.sleep(0.05)  # noqa: ASYNC251

    assert await standstill_ms(work) >= 50
