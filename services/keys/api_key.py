"""What is kept of an API key, and how a key is made and recognised.

    sk-0f3a9c1b2d4e-m9Zr...        sk-, the record's id, 256 random bits as 43 characters

Of a key only its SHA-256 is kept. One fast hash is right here: slow, salted ones make guessing expensive, and
256 random bits cannot be guessed, while a slow hash would let anybody keep a gateway busy with wrong keys.
The id finds the record; nothing about it is secret. The comparison takes the same time wherever two digests
differ first.

`salt` keeps the cached prompts of a key apart from others'. It is random, not made from the key, so it says
nothing about it; it stays when the key is rotated, and keys of one `cache_group` have the same.
"""

import hashlib
import hmac
import re
import secrets
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PREFIX = "sk-"
SALT_BYTES = 16
_ID_BYTES = 6
_SECRET_BYTES = 32
_KEY = re.compile(rb"sk-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")

KeyPriority = Literal["high", "normal", "low"]
Count = Annotated[int, Meta(ge=1, le=1 << 40)]
# Names are labels of metrics and columns of a table.
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")]
Moment = Annotated[datetime, Meta(tz=True)]


class KeyLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """None: no limit."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None  # of prompts and answers together
    concurrent: Count | None = None  # requests at the same time

    def __bool__(self) -> bool:
        return self != UNLIMITED


UNLIMITED = KeyLimits()


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{12}\Z")]
    name: Name
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    salt: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    created: Moment
    expires: Moment | None = None
    revoked: Moment | None = None
    limits: KeyLimits = UNLIMITED
    priority: KeyPriority = "normal"  # what its requests get; they may ask for less, not for more
    cache_group: Name | None = None
    admin: bool = False  # may ask about the cluster itself, not only for answers

    def ended(self, now: datetime) -> str:
        """Why it is refused: "revoked", "expired", or nothing."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else ""

    def is_of(self, key: bytes) -> bool:
        """Whether this is the key's record. In constant time."""
        return hmac.compare_digest(self.digest, digest_of(key))


def new_id() -> str:
    return secrets.token_hex(_ID_BYTES)


def new_salt() -> str:
    return secrets.token_hex(SALT_BYTES)


def new_key(key_id: str) -> str:
    """A key for the record with this id."""
    return f"{PREFIX}{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"


def id_in(key: bytes) -> str | None:
    """The id of the record that a key names; None if it is not of our form."""
    match = _KEY.fullmatch(key)
    return match.group(1).decode() if match else None


def digest_of(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
