"""The gateway's certificate for its clients: checked at the start, read again when it is renewed."""

import logging
import os
import ssl
from pathlib import Path

from services.core.clock import Clock
from services.core.errors import ConfigError

_LOOK_EVERY_S = 5.0

logger = logging.getLogger(__name__)


class HttpsContext:
    """`context` serves new connections with what the files held last. Raises ConfigError if that cannot work
    from the start."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._seen = self._versions()
        self.context = _load(cert, key)

    async def renew_forever(self, clock: Clock) -> None:
        while True:
            await clock.sleep(_LOOK_EVERY_S)
            self.renew()

    def renew(self) -> None:
        """Take up renewed files. Those that cannot work change nothing: they may be half written."""
        seen = self._versions()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            _load(self._cert, self._key)  # a context that cannot load a pair forgets the one it had
            self.context.load_cert_chain(self._cert, self._key)
            logger.info("the certificate in %s was renewed", self._cert)
        except (ConfigError, OSError) as error:
            logger.warning("a renewed certificate is not used: %s", error)

    def _versions(self) -> list[tuple[int, int] | None]:
        return [_version(path) for path in (self._cert, self._key)]


def open_https(cert: Path | None, key: Path | None) -> HttpsContext | None:
    """None if neither is set. Raises ConfigError."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("tls_cert and tls_key belong together: one of them is not set")
    return HttpsContext(cert, key)


def _load(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    for path in (cert, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"the key in {key} is not that of the certificate in {cert}") from error
        what = f"{cert} and {key} are not a certificate and its key in PEM form, without a password"
        raise ConfigError(f"{what}: {error.reason or error}") from error
    return context


def _version(path: Path) -> tuple[int, int] | None:
    try:
        seen = os.stat(path)
    except OSError:
        return None
    return seen.st_ino, seen.st_mtime_ns
