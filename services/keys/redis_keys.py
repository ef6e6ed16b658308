"""Keys in the Redis that the cluster shares.

    {namespace:keys}  ->  hash: version, a random name of the document; keys, the document

A gateway asks twice a second and gets the document only when the version is another one. Redis has to keep
what it holds (AOF or RDB) for keys to survive its restart; gateways that run go on with what they knew.
"""

import secrets

from services.keys.document import decoded, encoded
from services.keys.protocol import Kept, Keys
from services.store.connection import Call, Script, StoreConnection

_ANY = "*"  # no version

# KEYS: the document. ARGV: the version that is known. Returns nothing if it is still that one.
READ = Script("""
local version = redis.call('HGET', KEYS[1], 'version') or ''
if version == ARGV[1] then return false end
return {version, redis.call('HGET', KEYS[1], 'keys') or ''}
""")

# KEYS: the document. ARGV: the version that may be replaced, the new one, its keys. A call whose answer was
# lost is repeated: then the new version is there. Locking somebody out must be possible when there is no
# memory for more blocks in the index.
WRITE = Script("""#!lua flags=allow-oom
local version = redis.call('HGET', KEYS[1], 'version') or ''
if version == ARGV[2] then return 1 end
if version ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'keys', ARGV[3])
return 1
""")


class RedisKeys:
    """`url` as in StoreConnection. Clusters that share one Redis take different namespaces."""

    def __init__(self, url: str, *, timeout_s: float = 1.0, namespace: str = "diptych") -> None:
        self._store = StoreConnection(url, timeout_s)
        self._document = f"{{{namespace}:keys}}"

    async def read(self, unless: str | None = None) -> Kept | None:
        found = await self._store.run(Call(READ, [self._document], _ANY if unless is None else unless))
        if found is None:
            return None
        version, document = found
        return Kept(version.decode(), decoded(document, "Redis"))

    async def write(self, keys: Keys, after: str) -> bool:
        version = secrets.token_hex(8)
        return bool(await self._store.run(Call(WRITE, [self._document], after, version, encoded(keys))))

    async def close(self) -> None:
        await self._store.close()
