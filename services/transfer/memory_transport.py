"""The in-memory twin of KvTransport: servers of the same process, by address."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from services.core.block_hash import Compatibility
from services.core.errors import KvSourceLost
from services.transfer.destination import Destination
from services.transfer.inline import place_inline
from services.transfer.protocol import Arrived, KvSource, LendOrder, PullOrder
from services.transfer.server import KvServer


class MemoryKvTransport:
    def __init__(self, servers: Mapping[str, KvServer], compatibility: Compatibility) -> None:
        self._servers = servers
        self._compatibility = compatibility

    async def pull(
        self, source: KvSource, transfer_id: str, destination: Destination, first_token: int
    ) -> AsyncGenerator[Arrived, None]:
        order = PullOrder(
            transfer_id=transfer_id,
            first_token=first_token,
            epoch=source.epoch,
            compatibility=self._compatibility,
        )
        placing = place_inline(self._server(source).pull(order), destination, first_token)
        async with aclosing(placing) as arriving:
            async for arrived in arriving:
                yield arrived

    async def lend(self, source: KvSource, transfer_id: str, token_ids: Sequence[int], salt: str) -> int:
        order = LendOrder(
            transfer_id=transfer_id,
            token_ids=token_ids,
            salt=salt,
            epoch=source.epoch,
            compatibility=self._compatibility,
        )
        return await self._server(source).lend(order)

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
