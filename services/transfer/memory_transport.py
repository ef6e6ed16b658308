"""The in-memory twin of KvTransport: servers of the same process, by address."""

from collections.abc import AsyncGenerator, Mapping

from services.core.block_hash import Compatibility
from services.core.errors import KvSourceLost
from services.transfer.protocol import KvChunk, KvSource
from services.transfer.server import KvServer


class MemoryKvTransport:
    def __init__(self, servers: Mapping[str, KvServer], compatibility: Compatibility) -> None:
        self._servers = servers
        self._compatibility = compatibility

    async def pull(
        self, source: KvSource, transfer_id: str, first_token: int
    ) -> AsyncGenerator[KvChunk, None]:
        chunks = self._server(source).pull(transfer_id, first_token, source.epoch, self._compatibility)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def release(self, source: KvSource, transfer_id: str) -> bool:
        return self._server(source).release(transfer_id, source.epoch)

    def abandon(self, source: KvSource, transfer_id: str) -> None:
        if server := self._servers.get(source.address):
            server.release(transfer_id, source.epoch)

    async def close(self) -> None:
        pass

    def _server(self, source: KvSource) -> KvServer:
        if server := self._servers.get(source.address):
            return server
        raise KvSourceLost(f"no worker listens on {source.address}")
