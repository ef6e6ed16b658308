"""Who asks: the tenant that a request's API key names, and with whom its cached prompts are shared.

A key is turned into digests where it arrives and is kept nowhere else. The tenant's id, for fair sharing and
logs, and the salt, which travels to workers and is part of every block's hash, are different digests:
neither gives away the other. They are the same at every gateway, so nothing secret goes into them: whoever
reads the traffic to workers can try keys against a salt, and only long random keys withstand that.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

CacheSharing = Literal["key", "cluster"]

ID_BYTES = 8  # names a tenant among those of a cluster; nothing is kept apart by it
SALT_BYTES = 16  # as many as a block's hash: keys whose salts collide cannot be looked for


@dataclass(frozen=True, slots=True)
class Tenant:
    """`id` is empty for requests without a key: they are one tenant together."""

    id: str = ""
    key_digest: bytes = b""

    @classmethod
    def of(cls, authorization: str | None) -> "Tenant":
        """Of an Authorization header, `Bearer KEY`; anything else carries no key."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return ANYBODY
        encoded = key.strip().encode()
        return cls(
            id=hashlib.blake2b(encoded, digest_size=ID_BYTES, person=b"diptych-tenant").hexdigest(),
            key_digest=hashlib.blake2b(encoded, digest_size=SALT_BYTES, person=b"diptych-key").digest(),
        )

    def salt(self, cache_salt: str, sharing: CacheSharing) -> str:
        """What keeps the blocks of a request apart from others': prompts are shared where it is equal.

        Requests of one key share (or of the whole cluster), and among these the ones with the same
        `cache_salt`. Empty when nothing is to be kept apart.
        """
        key_digest = self.key_digest if sharing == "key" else b""
        if not key_digest and not cache_salt:
            return ""
        # A digest's length is fixed and `person` tells if there is one: no two pairs are spelled alike.
        person = b"diptych-salt-key" if key_digest else b"diptych-salt"
        salted = key_digest + cache_salt.encode()
        return hashlib.blake2b(salted, digest_size=SALT_BYTES, person=person).hexdigest()


ANYBODY = Tenant()
