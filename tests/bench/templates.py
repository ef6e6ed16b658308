"""What it costs to render chat templates in a process of their own, and whom it delays.

    python -m tests.bench.templates --renders 2000

The default model's template, for short chats, one of many messages and one with a single long message:
in this process and through the child, side by side, and the longest time for which the event loop stood still
meanwhile; the same for tokenising. Last a hostile template, while short chats go on.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median

import uvloop

from loadtest.summary import percentile
from services.core.errors import BadRequest
from services.gateway.text.chat_renderer import ChatRenderer, LocalRenderer, ProcessRenderer
from services.gateway.text.template_process import Limits
from services.gateway.text.tokenizing import Tokenizing
from services.model.chat_template import Chat
from services.model.files import open_model
from services.model.pull import ensure_default_model
from services.model.tokenizer import Tokenizer

WARM = 20
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def chat(messages: int, characters: int) -> Chat:
    return Chat(messages=[{"role": "user", "content": "word " * (characters // 5)}] * messages)


CHATS = {
    "3 messages, 300 characters": chat(3, 100),
    "20 messages, 20,000 characters": chat(20, 1000),
    "2,048 messages, 8 million characters": chat(2048, 4000),
    "1 message, 8 million characters": chat(1, 8_000_000),
}


@dataclass(frozen=True, slots=True)
class Times:
    """In milliseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        return cls(median(seconds) * 1e3, percentile(sorted(seconds), 99) * 1e3)


async def timed(renderer: ChatRenderer, what: Chat, times: int) -> Times:
    seconds: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        await renderer.render(what)
        seconds.append(time.perf_counter() - start)
    return Times.of(seconds)


async def standstill_ms(work: Callable[[], Awaitable[object]]) -> float:
    """The longest time for which nothing else ran in this event loop while `work` did."""
    longest = 0.0
    doing = asyncio.ensure_future(work())
    while not doing.done():
        start = time.perf_counter()
        await asyncio.sleep(0)
        longest = max(longest, time.perf_counter() - start)
    await doing
    return longest * 1e3


async def compare(tokenizer: Tokenizer, renders: int) -> None:
    template = tokenizer.chat_template
    local, child = LocalRenderer(template), ProcessRenderer(template, Limits(2.0))
    tokenizing = Tokenizing(tokenizer)
    await child.start()
    print(f"{'a chat of':38}{'here p50':>10}{'child p50':>10}{'p99 ms':>9}{'added':>8}{'loop held':>11}")
    for name, what in CHATS.items():
        times = renders if len(what.messages) < 100 and "million" not in name else 5
        for renderer in (local, child):
            await timed(renderer, what, min(WARM, times))
        here, there = await timed(local, what, times), await timed(child, what, times)
        held = await standstill_ms(lambda what=what: child.render(what))
        added = there.p50 - here.p50
        print(f"{name:38}{here.p50:10.3f}{there.p50:10.3f}{there.p99:9.3f}{added:8.3f}{held:11.1f}")
    text = "word " * 200_000
    held = await standstill_ms(lambda: tokenizing.encode([text], add_special_tokens=False))
    print(f"a million characters tokenised beside the loop: held for {held:.1f} ms")
    await beside_a_hostile_one(child)
    await child.close()


async def beside_a_hostile_one(child: ProcessRenderer) -> None:
    async def attack() -> None:
        try:
            await child.render(Chat(messages=[], template=ENDLESS))
        except BadRequest as error:
            print(f"an endless template of a client: {error.message}")

    attacking = asyncio.create_task(attack())
    beside = await timed(child, CHATS["3 messages, 300 characters"], 200)
    print(f"short chats beside it: p50 {beside.p50:.3f} ms, p99 {beside.p99:.3f} ms")
    await attacking


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.templates", description=__doc__)
    parser.add_argument("--renders", type=int, default=2000, help="of each chat that is not long")
    arguments = parser.parse_args()
    uvloop.run(compare(open_model(ensure_default_model()).tokenizer(), arguments.renders))


if __name__ == "__main__":
    main()
