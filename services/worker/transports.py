"""The KV transports of one worker: those that its configuration names and this machine has."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from services.core.block_hash import Compatibility
from services.core.clock import Clock
from services.core.errors import ConfigError, TransportUnavailable
from services.transfer.grpc_transport import GrpcKvTransport
from services.transfer.nixl_reader import NixlReader
from services.transfer.nixl_source import NixlSource
from services.transfer.nixl_transport import NixlKvTransport
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import TRANSPORTS, KvTransport
from services.wire.channel import Network

logger = logging.getLogger(__name__)


def parse_transports(text: str) -> list[str]:
    """The names in a comma-separated list, best first. Raises ConfigError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or set(names) - set(TRANSPORTS):
        raise ConfigError(f"--transports takes {', '.join(TRANSPORTS)} or one of them, not {text!r}")
    return names


@dataclass(frozen=True, slots=True)
class KvTransports:
    reading: KvTransport  # from others' pools
    nixl_source: NixlSource | None  # others' way into ours

    async def close(self) -> None:
        await self.reading.close()
        if self.nixl_source:
            self.nixl_source.close()


OpenTransports = Callable[
    [list[str], str, Compatibility, PoolMemory, Network, Clock], Coroutine[Any, Any, KvTransports]
]


async def open_transports(
    names: list[str],
    worker_id: str,
    compatibility: Compatibility,
    memory: PoolMemory,
    network: Network,
    clock: Clock,
) -> KvTransports:
    """NIXL that is not here is left out with a line in the log. Raises ConfigError if it is all there is."""
    grpc = GrpcKvTransport(compatibility, network)
    if "nixl" not in names or not network.direct:
        return KvTransports(grpc, None)
    try:
        return await _with_nixl(names, worker_id, memory, grpc, clock)
    except TransportUnavailable as error:
        if names == ["nixl"]:
            raise ConfigError(f"--transports nixl: {error.message}") from None
        logger.info("KV travels over gRPC alone: %s", error.message)
        return KvTransports(grpc, None)


async def _with_nixl(
    names: list[str], worker_id: str, memory: PoolMemory, grpc: GrpcKvTransport, clock: Clock
) -> KvTransports:
    reader = NixlReader(worker_id, memory.pool)
    await reader.start()
    try:
        # On a thread because UCX looks for devices.
        source = await asyncio.to_thread(NixlSource, worker_id, memory)
    except TransportUnavailable:
        await reader.close()
        raise
    return KvTransports(NixlKvTransport(grpc, reader, names, clock), source)
