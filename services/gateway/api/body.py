"""The memory and the time that request bodies may take: of each one, and of all together.

A body stays in memory until its request has been answered, and so it is counted until then.
"""

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope


@dataclass(frozen=True, slots=True)
class BodyLimits:
    bytes_max: int
    all_bytes_max: int
    timeout_s: float  # from the first look for it to its last byte


class Bodies:
    """Those of all requests that are here now."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self.bytes = 0

    def open(self, scope: Scope, receive: Receive) -> "Body":
        return Body(self, scope, receive)


class Body:
    def __init__(self, all_bodies: Bodies, scope: Scope, receive: Receive) -> None:
        self._all, self._receive = all_bodies, receive
        declared = Headers(scope=scope).get("content-length", "0")
        self._declared = int(declared) if declared.isdecimal() else 0
        self._bytes = 0
        self._whole = False
        self._until: float | None = None  # on the event loop's clock, once somebody reads it

    async def receive(self) -> Message:
        """As of ASGI. Raises HTTPException with 408, 413 or 429."""
        if self._whole:
            return await self._receive()  # the client goes, at some time
        self._check_size(self._declared)
        message = await self._in_time()
        self._count(len(message.get("body", b"")))
        self._whole = not message.get("more_body", False)
        return message

    def close(self) -> None:
        """It is in memory no more."""
        self._all.bytes -= self._bytes
        self._bytes = 0

    async def _in_time(self) -> Message:
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self._all.limits.timeout_s
        try:
            async with asyncio.timeout_at(self._until):
                return await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"The body took longer than {self._all.limits.timeout_s:g} s") from None

    def _count(self, size: int) -> None:
        self._bytes += size
        self._all.bytes += size
        self._check_size(self._bytes)
        if self._all.bytes > self._all.limits.all_bytes_max:
            raise HTTPException(
                429, "The server holds as many bytes of requests as it can", {"Retry-After": "1"}
            )

    def _check_size(self, size: int) -> None:
        if size > self._all.limits.bytes_max:
            raise HTTPException(413, f"The body is larger than {self._all.limits.bytes_max} bytes")
