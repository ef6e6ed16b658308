"""The memory that request bodies may take: of each one, and of all together.

A body stays in memory until its request has been answered, and so it is counted until then. Its time is the
connection's business.
"""

from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

FAR = 16  # times as large as a body may be


@dataclass(slots=True)
class Bodies:
    """Those of all requests that are here now."""

    each_bytes_max: int
    all_bytes_max: int
    bytes: int = 0

    def open(self, scope: Scope, receive: Receive) -> "Body":
        return Body(self, scope, receive)


class Body:
    def __init__(self, all_bodies: Bodies, scope: Scope, receive: Receive) -> None:
        self._all, self._receive = all_bodies, receive
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        self._declared = int(declared) if declared.isdecimal() else 0
        self._endless = "transfer-encoding" in headers  # nobody has said how long it is
        self._bytes = 0
        self._whole = False

    @property
    def has_no_end(self) -> bool:
        """Whether the rest of it is not worth receiving. One that is not wanted is received and thrown
        away (0.4 ms a megabyte) unless it is far too large: not all clients read an answer before a reset."""
        far = FAR * self._all.each_bytes_max
        return not self._whole and (self._endless or self._declared > far)

    async def receive(self) -> Message:
        """As of ASGI. Raises HTTPException with 413 or 429."""
        if self._whole:
            return await self._receive()  # the client goes, at some time
        self._check_size(self._declared)
        message = await self._receive()
        self._count(len(message.get("body", b"")))
        self._whole = not message.get("more_body", False)
        return message

    def close(self) -> None:
        """It is in memory no more."""
        self._all.bytes -= self._bytes
        self._bytes = 0

    def _count(self, size: int) -> None:
        self._bytes += size
        self._all.bytes += size
        self._check_size(self._bytes)
        if self._all.bytes > self._all.all_bytes_max:
            raise HTTPException(
                429, "The server holds as many bytes of requests as it can", {"Retry-After": "1"}
            )

    def _check_size(self, size: int) -> None:
        if size > self._all.each_bytes_max:
            raise HTTPException(413, f"The body is larger than {self._all.each_bytes_max} bytes")
