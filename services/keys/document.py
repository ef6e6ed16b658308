"""All keys as text: one JSON object a line. Blank lines and lines that begin with # are nobody's."""

from datetime import datetime, timedelta

import msgspec

from services.core.errors import ConfigError
from services.keys.api_key import ApiKey
from services.keys.protocol import KEYS_MAX, Keys


def encoded(keys: Keys) -> bytes:
    return b"".join(msgspec.json.encode(key) + b"\n" for key in keys)


def decoded(document: bytes, place: str) -> Keys:
    """Raises ConfigError that names the line of `place`, and quotes nothing of it."""
    keys = tuple(
        _decoded_line(line, number, place)
        for number, line in enumerate(document.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith(b"#")
    )
    if len(keys) > KEYS_MAX:
        raise ConfigError(f"{place} has {len(keys)} API keys; at most {KEYS_MAX} are possible")
    if len({key.id for key in keys}) < len(keys):
        raise ConfigError(f"{place} has two API keys of one id")
    return keys


def _decoded_line(line: bytes, number: int, place: str) -> ApiKey:
    try:
        return msgspec.json.decode(line, type=ApiKey)
    except msgspec.DecodeError as error:  # the parent of ValidationError; it names fields, no values
        raise ConfigError(f"{place}, line {number} is no API key: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{place}, line {number} is no API key: not UTF-8") from None


def without_old(keys: Keys, now: datetime, kept_for: timedelta = timedelta(days=90)) -> Keys:
    """Without those that were revoked or expired long ago: nobody asks who they were any more."""
    return tuple(
        key
        for key in keys
        if not any(ended is not None and ended <= now - kept_for for ended in (key.revoked, key.expires))
    )
