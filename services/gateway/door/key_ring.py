"""The keys that a gateway knows: read again whenever they change, kept while they cannot be read.

A new or revoked key counts at all gateways within POLL_S and the time to read it. A store that is away, a
document that is broken, and one that is gone (a Redis that lost what it had) leave the last keys in force,
with one line in the log when that begins and one when it is over.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from services.core.clock import Clock
from services.core.errors import ConfigError, DiptychError, InvalidKey, StoreUnavailable
from services.gateway.door.tenant import Tenant
from services.keys.api_key import ApiKey, id_in
from services.keys.protocol import NOTHING_KEPT, Keys, KeyStore

logger = logging.getLogger(__name__)

POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class _Known:
    key: ApiKey
    tenant: Tenant


class KeyRing:
    def __init__(
        self, store: KeyStore, clock: Clock, today: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._store, self._clock, self._today = store, clock, today
        self._version: str | None = None  # None: never read
        self._known: dict[str, _Known] = {}
        self._trouble = ""
        self.on_change: Callable[[Keys], None] = lambda keys: None

    def tenant_of(self, key: bytes) -> Tenant:
        """Raises InvalidKey, which says no more than the holder of the key may know; and StoreUnavailable."""
        if self._version is None:
            raise StoreUnavailable("The API keys cannot be read now. Try again in a moment.")
        key_id = id_in(key)
        known = self._known.get(key_id) if key_id is not None else None
        if known is None or not known.key.is_of(key):
            raise InvalidKey("The API key is not known here. Check it, or ask for one.")
        if ended := known.key.ended(self._today()):
            raise InvalidKey(f"The API key {known.key.name} is {ended}. Ask for a new one.")
        return known.tenant

    @property
    def is_read(self) -> bool:
        return self._version is not None

    async def follow(self) -> None:
        """Refresh for ever."""
        while True:
            await self._clock.sleep(POLL_S)
            await self.refresh()

    async def open(self) -> None:
        """The first look. Raises ConfigError for a document that cannot be understood."""
        try:
            kept = await self._store.read()
        except StoreUnavailable as error:
            self._complain(error)
            return
        assert kept is not None
        self._version = kept.version
        self._take(kept.keys)

    async def refresh(self) -> None:
        """Take what the store has now; what cannot be read changes nothing."""
        try:
            kept = await self._store.read(unless=self._version)
        except (StoreUnavailable, ConfigError) as error:
            self._complain(error)
            return
        if kept is not None and kept.version == NOTHING_KEPT and self._version is not None:
            self._complain(ConfigError("the API keys are gone; put them back, or create new ones"))
            return
        self._recover()
        if kept is not None:
            self._version = kept.version
            self._take(kept.keys)

    def _take(self, keys: Keys) -> None:
        self._known = {key.id: _Known(key, Tenant.of_key(key)) for key in keys}
        usable = sum(not key.ended(self._today()) for key in keys)
        level = logging.INFO if usable else logging.WARNING
        hint = "" if usable else ": every request is refused until `diptych keys create` has made one"
        logger.log(level, "%d API keys can be used%s", usable, hint)
        self.on_change(keys)

    def _complain(self, error: DiptychError) -> None:
        if error.message != self._trouble:
            logger.warning("the last known %d API keys stay in force: %s", len(self._known), error.message)
        self._trouble = error.message

    def _recover(self) -> None:
        if self._trouble:
            logger.info("the API keys can be read again")
        self._trouble = ""

    async def close(self) -> None:
        await self._store.close()
