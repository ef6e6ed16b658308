"""The connection to Redis (or Valkey, or a Redis Cluster), and the one place where its errors become ours.

The index and the membership each hold a StoreConnection. Every use of it is bounded in time and
fails only with StoreUnavailable, so that callers can go on with what they knew before.

Whether the server is one of a cluster is asked at the first call. All that index and membership do is
done by scripts, each of which touches the keys of one hash slot only, so the same code serves both.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisClusterException, RedisError

from services.core.errors import ConfigError, StoreFull, StoreUnavailable

CONNECTIONS_MAX = 16  # concurrent calls of one process; further ones wait their turn
# To one node of a cluster: a call takes one, a second look at the cluster's layout another one.
_NODE_CONNECTIONS_MAX = 2 * CONNECTIONS_MAX

Client: TypeAlias = Redis | RedisCluster


class Script:
    """A Lua script of ours. `keys` of one call share a hash tag; it may also touch keys that it finds
    in these, if they have the same tag."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Call:
    """One call of a Script."""

    def __init__(self, script: Script, keys: Sequence[str], *args: bytes | str | int) -> None:
        self.script = script
        self.operands = (len(keys), *keys, *args)


class StoreConnection:
    """Lazily opened connections to `url` and, if a cluster is found there, to all its nodes.

    `url` is redis://, rediss:// (TLS) or unix://; anything else is a ConfigError. `timeout_s` bounds
    each call as a whole, the wait for a connection included.
    """

    def __init__(self, url: str, timeout_s: float = 1.0) -> None:
        try:
            pool = ConnectionPool.from_url(
                url,
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
        self._url = url
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(CONNECTIONS_MAX)
        self._finding_out = asyncio.Lock()
        self._server: Redis = Redis.from_pool(pool)  # that the URL names
        self._client: Client | None = None  # None: not yet known what it is
        settings = pool.connection_kwargs  # names the server without the URL's password
        self._address = settings.get("path") or f"{settings.get('host')}:{settings.get('port', 6379)}"

    async def run(self, call: Call) -> Any:
        """What the script returns."""
        async with self.client() as client:
            return await _run(client, call)

    async def run_all(self, calls: Sequence[Call]) -> list[Any]:
        """What each of the scripts returns. One round trip, to all nodes concerned at the same time."""
        async with self.client() as client:
            if len(calls) == 1:
                return [await _run(client, calls[0])]
            pipeline: Any = client.pipeline(transaction=False)
            for call in calls:
                pipeline.execute_command("EVALSHA", call.script.sha, *call.operands)
            try:
                return list(await pipeline.execute())
            except NoScriptError:  # a node that has just started: all calls may be repeated
                return [await _run(client, call) for call in calls]

    async def is_cluster(self) -> bool:
        if self._client is None:
            async with self.client():
                pass
        return isinstance(self._client, RedisCluster)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """The client, for one call. Any failure inside leaves as StoreUnavailable."""
        client: Client | None = None
        try:
            async with asyncio.timeout(self._timeout_s), self._turns:
                client = self._client or await self._find_out()
                yield client
        except RedisClusterException as error:
            # No node that it knew answers, they may all have moved: ask the URL again next time.
            await self._forget(client)
            raise self._unavailable(error) from error
        except OutOfMemoryError as error:
            raise StoreFull(f"Redis at {self._address} is full, raise its maxmemory: {error}") from error
        except (RedisError, OSError) as error:  # the built-in TimeoutError is an OSError
            raise self._unavailable(error) from error

    async def version(self) -> str:
        """Of the server that the URL names, such as "valkey 9.1.2"."""
        async with self.client():
            hello = await self._hello()
        return f"{hello['server']} {hello['version']}"

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
        await self._server.aclose()

    async def _find_out(self) -> Client:
        async with self._finding_out:
            if self._client is None:  # nobody else was faster
                hello = await self._hello()
                if hello["mode"] == "cluster":
                    # Before anybody else has it: first calls at the same moment would break its connections.
                    self._client = await self._cluster().initialize()
                else:
                    self._client = self._server
            return self._client

    async def _hello(self) -> dict[str, str]:
        """What the server says of itself. INFO would say it too, but not to everybody."""
        said = await self._server.execute_command("HELLO")  # type: ignore[no-untyped-call]
        pairs = said.items() if isinstance(said, dict) else zip(said[::2], said[1::2], strict=True)
        return {key.decode(): value.decode() for key, value in pairs if isinstance(value, bytes)}

    def _cluster(self) -> RedisCluster:
        return RedisCluster.from_url(
            self._url,
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            max_connections=_NODE_CONNECTIONS_MAX,
            retry=Retry(NoBackoff(), retries=1),  # after a look at the cluster's present layout
        )

    async def _forget(self, client: Client | None) -> None:
        if client is not None and client is self._client:
            self._client = None
            await client.aclose()

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        reason = str(error) or f"no answer within {self._timeout_s} s"
        return StoreUnavailable(
            f"Redis at {self._address} is unavailable, check that it runs there: {reason}"
        )


async def _run(client: Client, call: Call) -> Any:
    try:
        return await client.execute_command("EVALSHA", call.script.sha, *call.operands)
    except NoScriptError:  # the server has just started; EVAL makes it know the script
        return await client.execute_command("EVAL", call.script.source, *call.operands)
