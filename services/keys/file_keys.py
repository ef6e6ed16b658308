"""Keys in a file of this machine, or one that is mounted on all. Readable by its owner alone.

A change is written beside the file and renamed over it: readers see the old document or the new one. Who
changes it holds a lock on FILE.lock, so two commands at once both count. People may edit it too; their editor
should replace the file, as most do, for half a file is a document, too.
"""

import asyncio
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.core.errors import ConfigError, StoreUnavailable
from services.keys.document import decoded, encoded
from services.keys.protocol import NOTHING_KEPT, Kept, Keys


class FileKeys:
    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self, unless: str | None = None) -> Kept | None:
        return await asyncio.to_thread(self._read, unless)

    async def write(self, keys: Keys, after: str) -> bool:
        return await asyncio.to_thread(self._write, keys, after)

    async def close(self) -> None:
        pass

    def _read(self, unless: str | None) -> Kept | None:
        try:
            version = self._version()
            if version == unless:
                return None
            document = self._path.read_bytes() if version != NOTHING_KEPT else b""
        except OSError as error:
            raise StoreUnavailable(f"cannot read the API keys: {error}") from error
        return Kept(version, decoded(document, str(self._path)))

    def _write(self, keys: Keys, after: str) -> bool:
        try:
            with self._locked():
                if self._version() != after:
                    return False
                self._replace(encoded(keys))
                return True
        except OSError as error:
            raise ConfigError(f"cannot write the API keys: {error}") from error

    def _version(self) -> str:
        try:
            seen = self._path.stat()
        except FileNotFoundError:
            return NOTHING_KEPT
        # An empty file is one that somebody is about to write.
        return f"{seen.st_mtime_ns}-{seen.st_ino}-{seen.st_size}" if seen.st_size else NOTHING_KEPT

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._path.with_name(self._path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _replace(self, document: bytes) -> None:
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(document)
                file.flush()
                os.fsync(descriptor)
            os.replace(fresh, self._path)
        finally:
            fresh.unlink(missing_ok=True)
