"""The connection to Redis (or Valkey), and the one place where its errors become ours.

The index and the membership each hold a StoreConnection. Every use of it is bounded in time and
fails only with StoreUnavailable, so that callers can go on with what they knew before.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from services.core.errors import ConfigError, StoreUnavailable

CONNECTIONS_MAX = 16  # concurrent calls of one process; further ones wait their turn


class StoreConnection:
    """A pool of lazily opened connections to `url`.

    `url` is redis://, rediss:// (TLS) or unix://; anything else is a ConfigError. `timeout_s` bounds
    each call as a whole, the wait for a connection included.
    """

    def __init__(self, url: str, timeout_s: float = 1.0) -> None:
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS_MAX,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # A restarted server leaves dead connections in the pool: one immediate second try
                # replaces them. All our commands may be repeated. A timeout is never tried again.
                retry=Retry(NoBackoff(), retries=1, supported_errors=(RedisConnectionError,)),
            )
        except ValueError as error:
            raise ConfigError(
                f"the Redis URL is not usable, pass --redis redis://HOST:PORT: {error}"
            ) from error
        self.redis: Redis = Redis.from_pool(pool)
        self._timeout_s = timeout_s
        settings = pool.connection_kwargs  # names the server without the URL's password
        self._address = settings.get("path") or f"{settings.get('host')}:{settings.get('port', 6379)}"

    @asynccontextmanager
    async def call(self) -> AsyncIterator[Redis]:
        """The client, for one call. Any failure inside leaves as StoreUnavailable."""
        try:
            async with asyncio.timeout(self._timeout_s):
                yield self.redis
        except (RedisError, OSError) as error:  # the built-in TimeoutError is an OSError
            reason = str(error) or f"no answer within {self._timeout_s} s"
            raise StoreUnavailable(
                f"Redis at {self._address} is unavailable, check that it runs there: {reason}"
            ) from error

    async def close(self) -> None:
        await self.redis.aclose()
