"""The revision of a model: a digest of the files that determine its numbers.

Workers share KV only if their revisions agree, so every worker computes it at start. Reading
gigabytes takes seconds to minutes; the digest of a file whose path, size and modification time
have not changed is therefore taken from a small JSON cache.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from services.core.errors import ModelFileError

REVISION_CHARS = 32  # of 64 hex digits: 128 bits, as wide as a block hash


class _FileDigest(msgspec.Struct, frozen=True):
    size: int  # bytes
    mtime_ns: int
    sha256: str


def weights_revision(files: Sequence[Path], cache_file: Path) -> str:
    """The first 32 hex digits of one file's SHA-256, or of the SHA-256 of several files' digests.

    The order of `files` counts. `cache_file` is only a shortcut: it may be absent, corrupt or
    impossible to write. Raises ModelFileError if a file cannot be read.
    """
    cache = _read_cache(cache_file)
    current = {str(file.resolve()): _digest(file, cache.get(str(file.resolve()))) for file in files}
    if any(cache.get(path) != digest for path, digest in current.items()):
        _write_cache(cache_file, cache | current)
    digests = [digest.sha256 for digest in current.values()]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return joined[:REVISION_CHARS]


def _digest(file: Path, cached: _FileDigest | None) -> _FileDigest:
    try:
        stat = file.stat()
        if cached is not None and (cached.size, cached.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return cached
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(
            f"{file} cannot be read ({error}). Check the path and its permissions."
        ) from error
    return _FileDigest(stat.st_size, stat.st_mtime_ns, sha256)


def _read_cache(cache_file: Path) -> dict[str, _FileDigest]:
    try:
        return msgspec.json.decode(cache_file.read_bytes(), type=dict[str, _FileDigest])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}


def _write_cache(cache_file: Path, cache: dict[str, _FileDigest]) -> None:
    # Workers of one machine start together and write at once: each writes a file of its own and
    # renames it, so that a reader sees one whole cache. A lost entry only costs another hashing,
    # and so does a directory that cannot be written.
    with contextlib.suppress(OSError):
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=cache_file.parent, prefix=cache_file.name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(msgspec.json.encode(cache))
            os.replace(name, cache_file)
        except OSError:
            os.unlink(name)
            raise
