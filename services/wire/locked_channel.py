"""Channels that show what a locked cluster asks for: a token with every call, the certificate of today.

Each is a channel around another. Not gRPC's interceptors: those wrap every message of a stream, these have a
part in the beginning of a call alone.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio

from services.wire.certificates import Certificates

TOKEN_KEY = "diptych-token"
_RETIRED_MAX = 1


class _Around(grpc.aio.Channel):
    """Hands everything on to the channel of the moment."""

    @abstractmethod
    def _inner(self) -> grpc.aio.Channel: ...

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner().unary_unary(*args, **kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner().unary_stream(*args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner().stream_unary(*args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner().stream_stream(*args, **kwargs)

    async def close(self, grace: float | None = None) -> None:
        await self._inner().close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner().channel_ready()

    async def __aenter__(self) -> "_Around":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class TokenChannel(_Around):
    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = grpc.aio.Metadata((TOKEN_KEY, token))

    def _inner(self) -> grpc.aio.Channel:
        return self._channel

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return partial(super().unary_unary(*args, **kwargs), metadata=self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return partial(super().unary_stream(*args, **kwargs), metadata=self._metadata)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return partial(super().stream_unary(*args, **kwargs), metadata=self._metadata)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return partial(super().stream_stream(*args, **kwargs), metadata=self._metadata)


class RenewedChannel(_Around):
    """gRPC connects a channel again with the certificate it was opened with, even when that has expired. So
    the first call after a renewal opens another one; calls that run go on with the one they began on."""

    def __init__(
        self, current: Callable[[], Certificates], open_with: Callable[[Certificates], grpc.aio.Channel]
    ) -> None:
        self._current, self._open_with = current, open_with
        self._certificates = current()
        self._channel = open_with(self._certificates)
        self._retired: list[grpc.aio.Channel] = []
        self._closing: set[asyncio.Task[None]] = set()

    def _inner(self) -> grpc.aio.Channel:
        now = self._current()
        if now is not self._certificates:
            self._retired.append(self._channel)
            self._certificates, self._channel = now, self._open_with(now)
            while len(self._retired) > _RETIRED_MAX:
                task = asyncio.ensure_future(self._retired.pop(0).close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        return self._channel

    async def close(self, grace: float | None = None) -> None:
        for channel in [*self._retired, self._channel]:
            await channel.close(grace)
        if self._closing:
            await asyncio.wait(self._closing)
