"""The in-memory twin of the key stores. `available` is its fault."""

from services.core.errors import StoreUnavailable
from services.keys.document import decoded, encoded
from services.keys.protocol import NOTHING_KEPT, Kept, Keys


class MemoryKeys:
    def __init__(self) -> None:
        self.available = True  # False: every call raises StoreUnavailable
        self._writes = 0
        self.document = b""

    async def read(self, unless: str | None = None) -> Kept | None:
        self._require_available()
        if self._version == unless:
            return None
        return Kept(self._version, decoded(self.document, "memory"))

    async def write(self, keys: Keys, after: str) -> bool:
        self._require_available()
        if self._version != after:
            return False
        self.put(encoded(keys))
        return True

    async def close(self) -> None:
        pass

    def put(self, document: bytes) -> None:
        """What somebody else writes, good or broken."""
        self._writes += 1
        self.document = document

    def lose_everything(self) -> None:
        """What a restart of Redis may do."""
        self.document, self._writes = b"", 0

    @property
    def _version(self) -> str:
        return str(self._writes) if self._writes else NOTHING_KEPT

    def _require_available(self) -> None:
        if not self.available:
            raise StoreUnavailable("the in-memory keys are switched off")
