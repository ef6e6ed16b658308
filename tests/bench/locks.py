"""What the locks between a cluster's parts cost a call, and a transfer of KV: a token, mutual TLS, and both,
beside none of them, in turn in one run.

    python -m tests.bench.locks [--quick]

Two processes on this machine: the source of `diptych doctor`, and this one. A call is a Release of a transfer
that nobody knows; a transfer is that of a prompt over gRPC, with checksums.
"""

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from services.launch.authority import create_authority
from services.launch.transfer_probe import ProbeSource, model_geometry, new_pool, open_reading
from services.transfer.protocol import KvTransport
from services.wire.cluster_lock import ClusterLock, lock_network

BLOCKS = 256  # 189 MB
CALLS = 2_000
ROUNDS, QUICK_ROUNDS = 7, 3
TOKEN = "a token of the benchmark, no secret"


def locks(folder: Path) -> dict[str, ClusterLock]:
    node = create_authority(folder).issue("node", [], days=30)
    files = {"cert": node / "tls.crt", "key": node / "tls.key", "ca": node / "ca.crt"}
    return {
        "none": ClusterLock(),
        "token": ClusterLock(token=TOKEN),
        "mutual TLS": ClusterLock(**files),
        "both": ClusterLock(**files, token=TOKEN),
    }


class Side:
    """One kind of lock: a source behind it, and a reader that has the key."""

    def __init__(self, probe: ProbeSource, reading: KvTransport) -> None:
        self._probe, self._reading = probe, reading
        self._memory = new_pool(model_geometry(BLOCKS))

    async def call_us(self, calls: int) -> float:
        """Of one call, when they come one after the other."""
        started_s = time.perf_counter()
        for _ in range(calls):
            await self._reading.release(self._probe.source, "nobody/0")
        return (time.perf_counter() - started_s) / calls * 1e6

    async def transfer_mb_s(self) -> float:
        geometry = self._memory.geometry
        received = await self._probe.transfer(self._reading, self._memory, BLOCKS * geometry.block_size)
        return received.bytes / received.transfer_ms / 1e3


async def measure(rounds: int) -> None:
    with TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            sides = {name: await _open(stack, lock) for name, lock in locks(Path(folder)).items()}
            calls: dict[str, list[float]] = {name: [] for name in sides}
            transfers: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(rounds + 1):
                for name, side in sides.items():
                    seen = await side.call_us(CALLS), await side.transfer_mb_s()
                    if number:  # the first round makes connections and touches pages
                        calls[name].append(seen[0])
                        transfers[name].append(seen[1])
    print(f"{'lock':12}{'us a call':>12}{'against none':>15}{'KV, MB/s':>12}{'against none':>15}")
    for name in calls:
        cost, share = ratio(calls, name), ratio(transfers, name)
        print(
            f"{name:12}{median(calls[name]):12.0f}{cost:15.2f}{median(transfers[name]):12,.0f}{share:15.2f}"
        )


def ratio(seen: Mapping[str, Sequence[float]], name: str) -> float:
    """The median over the rounds of what `name` had against what "none" had in the same round."""
    return median(one / none for one, none in zip(seen[name], seen["none"], strict=True))


async def _open(stack: AsyncExitStack, lock: ClusterLock) -> Side:
    geometry = model_geometry(BLOCKS)
    probe = await stack.enter_async_context(ProbeSource(geometry, with_nixl=False, lock=lock))
    transports = await open_reading(["grpc"], new_pool(geometry), lock_network(lock))
    stack.push_async_callback(transports.close)
    return Side(probe, transports.reading)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.locks", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    asyncio.run(measure(QUICK_ROUNDS if parser.parse_args().quick else ROUNDS))


if __name__ == "__main__":
    main()
