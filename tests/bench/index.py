"""Look-ups in the prefix index, beside the bare round trip and the layout that the index had before.

    python -m tests.bench.index [--quick]

A million blocks of 100 workers are in the index. A chain is looked up in some of them, of which

    common      all hold the first quarter, a system prompt, and one holds everything
    scattered   each holds a beginning of a length of its own: the most work that there can be

Measured is what a gateway waits: from the list of hashes to the number of blocks of each worker, in the
event loop and with the client that it has. The layouts and PING are called in turn, so that each ratio
compares the same minute. The layout before: a SET of whole hashes per worker, the chain in as many
arguments as it has blocks, and a binary search in the set of every worker.
"""

import argparse
import asyncio
import gc
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import uvloop
from redis.asyncio import Redis

from services.core.worker_report import WorkerKey
from services.index.protocol import PrefixIndex
from services.index.redis_index import RedisPrefixIndex
from services.worker.publisher import BATCH_BLOCKS_MAX
from tests.support.redis_binary import NoRedis
from tests.support.redis_servers import RedisServers

Held: TypeAlias = Literal["common", "scattered"]
WORKERS = [WorkerKey(f"worker-{number}", number) for number in range(100)]
AIM_MS = 1.0  # p99 of 256 blocks
TIMEOUT_S = 30.0
CONCURRENCY = 16


@dataclass(frozen=True)
class Size:
    blocks: int  # in the index, of all workers
    chains: tuple[int, ...]
    workers: tuple[int, ...]
    rounds: int


FULL = Size(blocks=1_000_000, chains=(16, 256, 4_096), workers=(1, 10, 100), rounds=400)
QUICK = Size(blocks=50_000, chains=(16, 256), workers=(1, 100), rounds=60)


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> "Latency":
        ordered = sorted(samples_ms)
        return cls(ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)])

    def __str__(self) -> str:
        return f"{self.p50:6.2f} {self.p99:6.2f}"


class LayoutBefore:
    """Implements what the benchmark needs of PrefixIndex."""

    LOCATE = """
    local counts = {}
    for w = 1, #KEYS do
      local low, high = 0, #ARGV
      while low < high do
        local middle = math.floor((low + high) / 2)
        if redis.call('SISMEMBER', KEYS[w], ARGV[middle + 1]) == 1 then
          low = middle + 1
        else
          high = middle
        end
      end
      counts[w] = low
    end
    return counts
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._locate: Any = redis.register_script(self.LOCATE)

    async def begin(self, worker: WorkerKey) -> None:
        await self._redis.unlink(self._key(worker))

    async def publish(self, worker: WorkerKey, stored: Sequence[bytes], evicted: Sequence[bytes]) -> bool:
        pipeline = self._redis.pipeline(transaction=False)
        if stored:
            pipeline.sadd(self._key(worker), *stored)
        if evicted:
            pipeline.srem(self._key(worker), *evicted)
        await pipeline.execute()
        return True

    async def locate(self, hashes: Sequence[bytes], workers: Sequence[WorkerKey]) -> dict[WorkerKey, int]:
        counts = await self._locate(keys=[self._key(worker) for worker in workers], args=hashes)
        return dict(zip(workers, counts, strict=True))

    def _key(self, worker: WorkerKey) -> str:
        return f"before:{worker.worker_id}:{worker.epoch}"


Layout: TypeAlias = PrefixIndex | LayoutBefore


def held_blocks(held: Held, chain: int, workers: int, rng: random.Random) -> list[int]:
    """How many leading blocks of the chain each worker holds."""
    if held == "scattered":
        return [rng.randint(0, chain) for _ in range(workers)]
    return [chain if number == workers // 2 else chain // 4 for number in range(workers)]


def batches(hashes: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for first in range(0, len(hashes), BATCH_BLOCKS_MAX):
        yield hashes[first : first + BATCH_BLOCKS_MAX]


class Bench:
    def __init__(self, url: str, clustered: bool, size: Size) -> None:
        self._index = RedisPrefixIndex(url, timeout_s=TIMEOUT_S)
        self._redis = Redis.from_url(url)
        self._clustered = clustered
        self._size = size
        self._rng = random.Random(1)
        self._layouts: dict[str, Layout] = {"index": self._index}
        if not clustered:  # the layout before does not work there
            self._layouts["before"] = LayoutBefore(self._redis)

    async def run(self, name: str) -> None:
        print(f"\n{name}, {self._size.blocks:,} blocks in the index")
        for layout_name, layout in self._layouts.items():
            print(f"  {layout_name:7} {await self._fill(layout)}")
        print(HEADER)
        for held in ("common", "scattered"):
            for chain in self._size.chains:
                for workers in self._size.workers:
                    print(await self._row(held, chain, workers))
        await self._index.close()
        await self._redis.aclose()

    async def _fill(self, layout: Layout) -> str:
        """Publish all blocks as a worker does, batch by batch."""
        each = self._size.blocks // len(WORKERS)
        before_bytes = await self._used_memory()
        took_s = 0.0
        for worker in WORKERS:
            hashes = [self._rng.randbytes(16) for _ in range(each)]
            await layout.begin(worker)
            started_s = time.perf_counter()
            for batch in batches(hashes):
                await layout.publish(worker, batch, [])
            took_s += time.perf_counter() - started_s
        per_block = (await self._used_memory() - before_bytes) / self._size.blocks
        memory = "" if self._clustered else f", {per_block:.1f} bytes of used_memory per block"
        return f"published at {self._size.blocks / took_s:,.0f} blocks/s{memory}"

    async def _used_memory(self) -> int:
        return int((await self._redis.info("memory"))["used_memory"])

    async def _row(self, held: Held, chain: int, workers: int) -> str:
        hashes = [self._rng.randbytes(16) for _ in range(chain)]
        asked = WORKERS[:workers]
        lengths = dict(zip(asked, held_blocks(held, chain, workers, self._rng), strict=True))
        await self._publish_chain(hashes, lengths)
        calls = {name: self._locating(layout, hashes, asked) for name, layout in self._layouts.items()}
        for name, call in calls.items():
            assert await call() == lengths, f"{name} gives a wrong answer"
        calls["ping"] = self._redis.ping
        latencies = await in_turn(calls, self._size.rounds)
        per_s = {
            name: await at_once(call, self._size.rounds * 2) for name, call in calls.items() if name != "ping"
        }
        await self._publish_chain(hashes, lengths, evict=True)
        return row(f"{held:9} {chain:6,} {workers:7}", latencies, per_s)

    def _locating(
        self, layout: Layout, hashes: list[bytes], workers: list[WorkerKey]
    ) -> Callable[[], Awaitable[Any]]:
        return lambda: layout.locate(hashes, workers)

    async def _publish_chain(
        self, hashes: list[bytes], lengths: dict[WorkerKey, int], *, evict: bool = False
    ) -> None:
        for layout in self._layouts.values():
            for worker, length in lengths.items():
                for batch in batches(hashes[:length]):
                    await layout.publish(worker, *(([], batch) if evict else (batch, [])))


async def in_turn(calls: dict[str, Callable[[], Awaitable[Any]]], rounds: int) -> dict[str, Latency]:
    """The latency of each call, one at a time."""
    samples_ms: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for _ in range(rounds):
        for name, call in calls.items():
            started_s = time.perf_counter()
            await call()
            samples_ms[name].append(1e3 * (time.perf_counter() - started_s))
    return {name: Latency.of(samples) for name, samples in samples_ms.items()}


async def at_once(call: Callable[[], Awaitable[Any]], calls: int) -> tuple[float, Latency]:
    """Calls per second, and their latency, with CONCURRENCY of them at any moment."""
    samples_ms: list[float] = []

    async def client() -> None:
        while len(samples_ms) < calls:
            started_s = time.perf_counter()
            await call()
            samples_ms.append(1e3 * (time.perf_counter() - started_s))

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return len(samples_ms) / (time.perf_counter() - started_s), Latency.of(samples_ms)


# "before" says how many times as fast as that layout.
HEADER = f"""
                            one at a time, ms                              {CONCURRENCY} at a time
held       chain workers    p50    p99  p99 of PING  times PING    before  look-ups/s    p99    before"""


def row(label: str, latencies: dict[str, Latency], per_s: dict[str, tuple[float, Latency]]) -> str:
    index, ping, before = latencies["index"], latencies["ping"], latencies.get("before")
    look_ups, together = per_s["index"]
    faster = f"{before.p50 / index.p50:8.1f}x" if before else f"{'-':>9}"
    faster_together = f"{look_ups / per_s['before'][0]:8.1f}x" if before else f"{'-':>9}"
    late = ""
    if " 256 " in label and index.p99 > AIM_MS:
        late = "  over the aim" if ping.p99 < AIM_MS / 2 else "  busy machine"  # which delays a PING as much
    return (
        f"{label} {index} {ping.p99:12.2f} {index.p50 / ping.p50:10.1f}x {faster} "
        f"{look_ups:11,.0f} {together.p99:6.2f} {faster_together}{late}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few blocks, few rounds")
    size = QUICK if parser.parse_args().quick else FULL
    with RedisServers() as servers:
        for kind in ("valkey", "redis", "redis cluster"):
            try:
                url = servers.url(kind)
            except NoRedis as error:
                print(f"\nno {kind}: {error}")
                continue
            uvloop.run(Bench(url, kind.endswith("cluster"), size).run(kind))


if __name__ == "__main__":
    main()
