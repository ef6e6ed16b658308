"""How fast KV moves between two processes, beside what the links can do in the same minute.

    python -m tests.bench.transfer [--quick] [--rounds N]

Blocks are those of the default model. Every transport pulls them as a decode worker does: from the
request for the first one to the confirmed lease, checksums, copies and leases included. Beside it:

    memcpy     the same bytes from memory to memory, in one process
    tcp        a raw socket, 1 MiB a write
    bare gRPC  a stream of messages of the same size, from the same kind of server, that nobody reads
    raw NIXL   one read of everything

All are measured in turn, twice each, N times (the faster of the two counts); shown are the medians, and
for ratios the median of the rounds' ratios. Exposed time: a prompt of 1,024 tokens "computed" in chunks of
128 at 1 ms per token (as fast as the default model on one core); what of the transfer is left after the
last chunk, per prefill time.
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import median

from services.launch.transfer_probe import ProbeSource, model_geometry, new_pool, open_reading
from services.transfer.server import CHUNK_BYTES
from tests.bench.transfer_limits import LimitSource, has_nixl

SIZES = (16, 64, 256, 1024, 4096)
QUICK_SIZES = (16, 64, 256)
POOL_BLOCKS = 1024  # 755 MB; longer prompts run through it again
PROMPT, CHUNK, MS_PER_TOKEN = 1024, 128, 1.0
AIMS = {"grpc": ("bare gRPC", 0.90), "nixl": ("raw NIXL", 0.90)}


class Bench:
    def __init__(self, pool_blocks: int, names: list[str]) -> None:
        self.geometry = model_geometry(pool_blocks)
        self.memory = new_pool(self.geometry)
        self.names = names
        self._other = new_pool(self.geometry)
        self.message_bytes = max(CHUNK_BYTES // self.geometry.block_bytes, 1) * self.geometry.block_bytes

    async def __aenter__(self) -> "Bench":
        self.probe = await ProbeSource(self.geometry, "nixl" in self.names).__aenter__()
        self.readings = {name: await open_reading([name], self.memory) for name in self.names}
        self.limits = LimitSource(self.geometry.blocks, self.memory)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.limits.close()
        for transports in self.readings.values():
            await transports.close()
        await self.probe.__aexit__(None, None, None)

    async def one_round(self, blocks: int) -> dict[str, float]:
        """MB/s of everything, in turn; each twice, so that its memory is as warm as can be."""
        size = blocks * self.geometry.block_bytes
        speeds: dict[str, float] = {}
        for name, measure in self._measures(blocks, size):
            speeds[name] = size / min(await measure(), await measure()) / 1e6
        return speeds

    def _measures(self, blocks: int, size: int) -> list[tuple[str, Callable[[], Awaitable[float]]]]:
        """What takes how many seconds."""
        measures: list[tuple[str, Callable[[], Awaitable[float]]]] = [
            ("memcpy", partial(asyncio.to_thread, self.limits.memcpy, size, self._other.pool)),
            ("tcp", partial(asyncio.to_thread, self.limits.tcp, size)),
            ("bare gRPC", partial(self.limits.grpc, size, self.message_bytes)),
            ("grpc", partial(self._pull, "grpc", blocks)),
        ]
        if "nixl" in self.names:
            measures += [
                ("raw NIXL", partial(asyncio.to_thread, self.limits.nixl, size)),
                ("nixl", partial(self._pull, "nixl", blocks)),
            ]
        return measures

    async def exposed_share(self, name: str) -> float:
        received = await self.probe.transfer(
            self.readings[name].reading, self.memory, PROMPT, CHUNK, CHUNK * MS_PER_TOKEN
        )
        return received.exposed_ms / (PROMPT * MS_PER_TOKEN)

    async def _pull(self, name: str, blocks: int) -> float:
        tokens = blocks * self.geometry.block_size
        received = await self.probe.transfer(self.readings[name].reading, self.memory, tokens)
        assert received.bytes == blocks * self.geometry.block_bytes
        return received.transfer_ms / 1e3


async def measure(sizes: tuple[int, ...], rounds: int) -> bool:
    """Print everything; whether all aims hold."""
    names = ["grpc", "nixl"] if has_nixl() else ["grpc"]
    async with Bench(min(max(sizes), POOL_BLOCKS), names) as bench:
        await bench.one_round(sizes[0])  # connections are made, pages are touched
        print(_header(names), flush=True)
        holds = [await _measure_size(bench, blocks, rounds) for blocks in sizes]
        print(f"\nmessages of {bench.message_bytes:,} bytes; exposed share of a prefill of {PROMPT} tokens:")
        for name in names:
            shares = [await bench.exposed_share(name) for _ in range(rounds)]
            print(f"  {name}: {median(shares):.2%} (worst {max(shares):.2%})", flush=True)
            holds.append(median(shares) < 0.05)
    return all(holds)


async def _measure_size(bench: Bench, blocks: int, rounds: int) -> bool:
    seen = [await bench.one_round(blocks) for _ in range(rounds)]
    ratios = {
        name: median(one[name] / one[limit] for one in seen)
        for name, (limit, _) in AIMS.items()
        if name in bench.names
    }
    speeds = "".join(f"{median(one[column] for one in seen):10,.0f}" for column in seen[0])
    shown = "".join(f"{ratio:8.0%} of {AIMS[name][0]}" for name, ratio in ratios.items())
    print(f"{blocks:6d}{speeds}{shown}", flush=True)
    return all(ratio >= AIMS[name][1] for name, ratio in ratios.items())


def _header(names: list[str]) -> str:
    columns = ["memcpy", "tcp", "bare gRPC", "grpc"] + (["raw NIXL", "nixl"] if "nixl" in names else [])
    return "blocks" + "".join(f"{column:>10}" for column in columns) + "    (MB/s)"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.transfer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_SIZES} blocks")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    given = parser.parse_args()
    holds = asyncio.run(measure(QUICK_SIZES if given.quick else SIZES, max(given.rounds, 1)))
    print(
        "all aims hold"
        if holds
        else "not all aims hold: grpc and nixl >= 90 % of their limits, exposed < 5 %"
    )


if __name__ == "__main__":
    main()
