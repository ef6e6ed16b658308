"""What arrives for one reader: it takes all that is there at once, so that a burst wakes it once.

No inbox has a bound of its own: what is put into it is bounded by the tokens of an answer.
"""

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    def __init__(self) -> None:
        self._items: list[T] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> list[T]:
        """All that has come since the last call, in order; waits until there is something."""
        if not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        taken, self._items = self._items, []
        return taken
