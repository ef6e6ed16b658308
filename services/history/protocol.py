"""Where answers of the Responses API are kept, so that a later request can go on from them.

An answer belongs to its owner: nobody else can read or delete it, or find out that it exists. It is kept
for a time, and of one owner the latest KEPT_MAX: together with the bound on each one's size, which whoever
stores it keeps, that bounds the memory that one owner can take.
"""

from typing import Protocol

KEPT_MAX = 1000


class History(Protocol):
    """Every call raises StoreUnavailable if the store does not answer."""

    async def put(self, owner: str, response_id: str, answer: bytes) -> None:
        """Keep `answer`. Raises StoreFull."""
        ...

    async def get(self, owner: str, response_id: str) -> bytes | None:
        """None: it was never there, or is not any more, or is somebody else's."""
        ...

    async def delete(self, owner: str, response_id: str) -> bool:
        """Whether it was there."""
        ...

    async def close(self) -> None: ...
