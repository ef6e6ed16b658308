"""Who asks: the tenant that a request's API key names, and with whom its cached prompts are shared.

With keys configured the tenant is the key's record: its id, for fair sharing, logs and limits, and its salt,
which is random. The key itself is forgotten once it has been compared.

Without, any key will do, and tenants are told apart by digests of it, a different one for the id and for the
salt, so that neither gives away the other. These are the same at every gateway, so nothing secret goes into
them: whoever reads the traffic to workers can try keys against a salt, and only long random keys withstand
that.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from services.gateway.admission.fair_queue import Priority
from services.keys.api_key import UNLIMITED, ApiKey, KeyLimits

CacheSharing = Literal["key", "cluster"]

ID_BYTES = 8  # names a tenant among those of a cluster; nothing is kept apart by it
SALT_BYTES = 16  # as many as a block's hash: keys whose salts collide cannot be looked for


@dataclass(frozen=True, slots=True)
class Tenant:
    """`id` is empty for requests without a key where none is needed: they are one tenant together."""

    id: str = ""
    cache_key: bytes = field(default=b"", repr=False)  # requests that share cached prompts have one in common
    name: str = ""  # of a configured key
    limits: KeyLimits = UNLIMITED
    # What its requests get, or less if they ask for less; None: what they ask for.
    priority: Priority | None = None
    admin: bool = True  # may ask about the cluster itself

    @classmethod
    def of(cls, authorization: str | None) -> "Tenant":
        """Of an Authorization header, `Bearer KEY`; anything else carries no key."""
        key = bearer(authorization)
        if key is None:
            return ANYBODY
        return cls(
            id=hashlib.blake2b(key, digest_size=ID_BYTES, person=b"diptych-tenant").hexdigest(),
            cache_key=hashlib.blake2b(key, digest_size=SALT_BYTES, person=b"diptych-key").digest(),
        )

    @classmethod
    def of_key(cls, key: ApiKey) -> "Tenant":
        return cls(
            id=key.id,
            cache_key=bytes.fromhex(key.salt),
            name=key.name,
            limits=key.limits,
            priority=Priority[key.priority.upper()],
            admin=key.admin,
        )

    def priority_for(self, asked: Priority | None) -> Priority:
        """Of a request that asks for this one; None: for none."""
        if self.priority is None:
            return Priority.NORMAL if asked is None else asked
        return self.priority if asked is None else max(self.priority, asked)

    def salt(self, cache_salt: str, sharing: CacheSharing) -> str:
        """What keeps the blocks of a request apart from others': prompts are shared where it is equal.

        Requests of one key share (or of the whole cluster), and among these the ones with the same
        `cache_salt`. Empty when nothing is to be kept apart.
        """
        cache_key = self.cache_key if sharing == "key" else b""
        if not cache_key and not cache_salt:
            return ""
        # A key's length is fixed and `person` tells if there is one: no two pairs are spelled alike.
        person = b"diptych-salt-key" if cache_key else b"diptych-salt"
        salted = cache_key + cache_salt.encode()
        return hashlib.blake2b(salted, digest_size=SALT_BYTES, person=person).hexdigest()


def bearer(authorization: str | None) -> bytes | None:
    """The key in an Authorization header."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return None
    return key.strip().encode()


ANYBODY = Tenant()
