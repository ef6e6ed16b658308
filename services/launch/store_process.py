"""The embedded Valkey server as a part of a local cluster: restarted on its port when it dies."""

import secrets

from services.launch.child import exit_code
from services.store.embedded import EmbeddedValkey


class StoreProcess:
    name = "valkey"

    def __init__(self) -> None:
        self._valkey = EmbeddedValkey(password=secrets.token_hex(32))

    @property
    def url(self) -> str:
        return self._valkey.url

    @property
    def pid(self) -> int:
        return self._valkey.pid

    def start(self) -> None:
        """Start and wait until it answers; a restart keeps the port that the workers know."""
        self._valkey.start(port=self._valkey.port)

    async def is_ready(self) -> bool:
        return True  # `start` has waited for its answer

    async def wait(self) -> int:
        return await exit_code(self._valkey.pid)

    def log_tail(self) -> str:
        return ""  # the errors of `start` carry its last words

    def stop(self) -> None:
        self._valkey.stop()
