"""What can be done to the keys of a store: create, revoke, rotate, change. Each is one atomic replacement."""

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from services.core.errors import ConfigError, StoreUnavailable
from services.keys.api_key import (
    UNLIMITED,
    ApiKey,
    KeyLimits,
    KeyPriority,
    digest_of,
    new_id,
    new_key,
    new_salt,
)
from services.keys.document import without_old
from services.keys.protocol import KEYS_MAX, Keys, KeyStore

T = TypeVar("T")

_TRIES_MAX = 20  # others may change keys at the same moment, but they are people


async def create(
    store: KeyStore,
    name: str,
    now: datetime,
    *,
    limits: KeyLimits = UNLIMITED,
    priority: KeyPriority = "normal",
    expires: datetime | None = None,
    cache_group: str | None = None,
    admin: bool = False,
) -> tuple[ApiKey, str]:
    """The new record, and the key itself, which is kept nowhere. Raises ConfigError for a name that is in
    use or cannot be one."""

    def add(keys: Keys) -> tuple[Keys, tuple[ApiKey, str]]:
        if any(key.name == name and not key.ended(now) for key in keys):
            raise ConfigError(f"a key is called {name!r} already; revoke or rotate it, or take another name")
        if len(keys) >= KEYS_MAX:
            raise ConfigError(f"there are {KEYS_MAX} keys already; those that ended go after 90 days")
        key_id = _free_id(keys)
        secret = new_key(key_id)
        key = ApiKey(
            id=key_id,
            name=name,
            digest=digest_of(secret.encode()),
            salt=_salt(keys, cache_group),
            created=now,
            expires=expires,
            limits=limits,
            priority=priority,
            cache_group=cache_group,
            admin=admin,
        )
        return (*keys, _checked(key)), (key, secret)

    return await _changed(store, add, now)


async def revoke(store: KeyStore, name: str, now: datetime) -> ApiKey:
    """Raises ConfigError if no such key is in use."""
    return await _replaced(store, name, now, lambda key: msgspec.structs.replace(key, revoked=now))


async def rotate(store: KeyStore, name: str, now: datetime) -> tuple[ApiKey, str]:
    """A new key for the same record: name, limits and cached prompts stay, the old key is refused."""
    made: list[str] = []

    def with_new_key(key: ApiKey) -> ApiKey:
        made.append(new_key(key.id))
        return msgspec.structs.replace(key, digest=digest_of(made[-1].encode()))

    return await _replaced(store, name, now, with_new_key), made[-1]


async def change(store: KeyStore, name: str, now: datetime, **fields: Any) -> ApiKey:
    """Give the record these fields; `limits` as a mapping is merged into those it has."""

    def with_fields(key: ApiKey) -> ApiKey:
        limits = msgspec.structs.replace(key.limits, **fields.get("limits", {}))
        return _checked(msgspec.structs.replace(key, **{**fields, "limits": limits}))

    return await _replaced(store, name, now, with_fields)


async def _replaced(
    store: KeyStore, name: str, now: datetime, replacement: Callable[[ApiKey], ApiKey]
) -> ApiKey:
    """`name` is a name or an id."""

    def replace(keys: Keys) -> tuple[Keys, ApiKey]:
        found = [key for key in keys if name in (key.name, key.id) and key.revoked is None]
        if not found:
            raise ConfigError(f"no key in use is called {name!r}; `diptych keys list` shows them")
        old = found[-1]  # an expired one may have had the same name
        new = replacement(old)
        return tuple(new if key is old else key for key in keys), new

    return await _changed(store, replace, now)


async def _changed(store: KeyStore, changing: Callable[[Keys], tuple[Keys, T]], now: datetime) -> T:
    for _ in range(_TRIES_MAX):
        kept = await store.read()
        assert kept is not None
        keys, result = changing(without_old(kept.keys, now))
        if await store.write(keys, after=kept.version):
            return result
    raise StoreUnavailable("the API keys are changed by others all the time; try again")


def _salt(keys: Keys, cache_group: str | None) -> str:
    """That of the group, or a new one."""
    shared = (key.salt for key in keys if cache_group is not None and key.cache_group == cache_group)
    return next(shared, None) or new_salt()


def _free_id(keys: Keys) -> str:
    taken = {key.id for key in keys}
    while (key_id := new_id()) in taken:
        pass
    return key_id


def _checked(key: ApiKey) -> ApiKey:
    """As a reader of the document would check it."""
    try:
        return msgspec.convert(msgspec.to_builtins(key), ApiKey)
    except msgspec.ValidationError as error:
        raise ConfigError(f"not possible for an API key: {error}") from None
