"""Which store a setting means: file:PATH, or redis for the one that the cluster shares."""

from pathlib import Path

from services.core.errors import ConfigError
from services.keys.file_keys import FileKeys
from services.keys.protocol import KeyStore
from services.keys.redis_keys import RedisKeys


def open_keys(setting: str, redis_url: str) -> KeyStore:
    """Raises ConfigError for any other setting, and for redis without its URL."""
    kind, _, path = setting.partition(":")
    if kind == "file" and path:
        return FileKeys(Path(path).expanduser())
    if setting != "redis":
        raise ConfigError(f"API keys are kept in file:PATH or in redis, not in {setting!r}")
    if not redis_url:
        raise ConfigError("API keys in Redis need --redis URL")
    return RedisKeys(redis_url)
