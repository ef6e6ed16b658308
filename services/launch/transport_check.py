"""Whether each KV transport works between two processes here, its bandwidth and its latency."""

import asyncio

from services.core.errors import DiptychError
from services.launch.checks import Finding
from services.launch.transfer_probe import (
    ProbeSource,
    model_geometry,
    new_pool,
    open_reading,
)
from services.transfer.nixl_reach import reach_from_here
from services.transfer.protocol import TRANSPORTS

_BLOCKS = 128  # 94 MB
_REPEATS = 3
_TIMEOUT_S = 60.0


def check_transports() -> list[Finding]:
    return [asyncio.run(_check(name)) for name in TRANSPORTS]


async def _check(name: str) -> Finding:
    check = f"transport {name}"
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await _measure(check, name)
    except (DiptychError, TimeoutError) as error:
        reason = str(error) or f"no answer within {_TIMEOUT_S:g} s"
        # Without NIXL a cluster works; without gRPC nothing does.
        return Finding(check=check, state="broken" if name == "grpc" else "warning", detail=reason)


async def _measure(check: str, name: str) -> Finding:
    geometry = model_geometry(_BLOCKS)
    memory = new_pool(geometry)
    transports = await open_reading([name], memory)
    try:
        async with ProbeSource(geometry, with_nixl=name == "nixl") as probe:
            one_block = [
                await probe.transfer(transports.reading, memory, geometry.block_size) for _ in range(10)
            ]
            all_blocks = [
                await probe.transfer(transports.reading, memory, _BLOCKS * geometry.block_size)
                for _ in range(_REPEATS)
            ]
    finally:
        await transports.close()
    latency_ms = min(received.transfer_ms for received in one_block)
    best = min(all_blocks, key=lambda received: received.transfer_ms)
    megabytes_per_s = best.bytes / best.transfer_ms / 1e3
    detail = f"{megabytes_per_s:,.0f} MB/s, {latency_ms:.1f} ms for a block of {geometry.block_bytes:,} bytes"
    if name == "nixl" and not reach_from_here().rdma:
        detail += "; within this machine only: no RDMA device"
    figures = {"megabytes_per_s": megabytes_per_s, "latency_ms": latency_ms}
    return Finding(check=check, state="ok", detail=detail, figures=figures)
