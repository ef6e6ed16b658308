"""What the door costs: recognising a key, and taking from its limits, beside a bare round trip to Redis.

    python -m tests.bench.door [--calls N]        (make bench-door)

All run in turn in one process, against one embedded Valkey, so the ratios say what the script adds.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import NamedTuple

from services.core.clock import SystemClock
from services.gateway.door.key_ring import KeyRing
from services.keys import changes
from services.keys.api_key import KeyLimits
from services.keys.memory_keys import MemoryKeys
from services.keys.protocol import Use
from services.keys.redis_limits import RedisLimits
from services.store.connection import Call, Script, StoreConnection
from services.store.embedded import EmbeddedValkey

KEYS = 1000
NOTHING = Script("return 0")
LIMITS = KeyLimits(requests_per_minute=1 << 30, tokens_per_minute=1 << 30, concurrent=1 << 30)
Work = Callable[[int], Awaitable[object]]


class Row(NamedTuple):
    name: str
    p50_ms: float
    p99_ms: float


def row(name: str, seconds: list[float]) -> Row:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return Row(name, cuts[49] * 1e3, cuts[98] * 1e3)


def table(rows: list[Row]) -> str:
    """Beside the first row."""
    base = rows[0]
    lines = [f"{'':34}{'p50 ms':>9}{'p99 ms':>9}{'ratio':>7}"]
    lines += [f"{r.name:34}{r.p50_ms:9.4f}{r.p99_ms:9.4f}{r.p50_ms / base.p50_ms:7.2f}" for r in rows]
    return "\n".join(lines)


async def measured(works: dict[str, Work], calls: int) -> list[Row]:
    """In turns, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(calls):
        for name, work in works.items():
            started = time.perf_counter()
            await work(number)
            seconds[name].append(time.perf_counter() - started)
    return [row(name, times) for name, times in seconds.items()]


async def run(url: str, calls: int) -> list[Row]:
    store, limits = StoreConnection(url), RedisLimits(url, timeout_s=5.0)
    keys = MemoryKeys()
    secrets = [(await changes.create(keys, f"key{n}", datetime.now(UTC)))[1].encode() for n in range(KEYS)]
    ring = KeyRing(keys, SystemClock())
    await ring.open()

    async def recognise(number: int) -> object:
        return ring.tenant_of(secrets[number % KEYS])

    works: dict[str, Work] = {
        "a script that does nothing": lambda number: store.run(Call(NOTHING, ["{door}"])),
        "take a request and a lease": lambda number: limits.take(
            f"{number % KEYS:012x}", LIMITS, Use(1, 0, f"r{number}")
        ),
        "take the tokens of its prompt": lambda number: limits.take(
            f"{number % KEYS:012x}", LIMITS, Use(tokens=100)
        ),
        "give the lease back, count tokens": lambda number: limits.settle(
            f"{number % KEYS:012x}", LIMITS, 50, [], [f"r{number}"]
        ),
        f"recognise one of {KEYS} keys": recognise,
    }
    try:
        await measured(works, KEYS)  # warm
        return await measured(works, calls)
    finally:
        await limits.close()
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=5000)
    arguments = parser.parse_args()
    with EmbeddedValkey() as valkey:
        print(table(asyncio.run(run(valkey.url, arguments.calls))))


if __name__ == "__main__":
    main()
