"""What every History promises, proven for the real one and its in-memory twin alike."""

import uuid
from dataclasses import dataclass
from typing import Any

import pytest

from services.core.clock import ManualClock
from services.core.errors import StoreUnavailable
from services.history.memory_history import MemoryHistory
from services.history.protocol import History
from services.history.redis_history import RedisHistory
from tests.support.redis_servers import KINDS, client_of

TTL_S, KEPT_MAX = 20.0, 3


@dataclass
class MemoryStore:
    clock: ManualClock
    history: MemoryHistory

    async def pass_time(self, seconds):
        self.clock.advance(seconds)


@dataclass
class RedisStore:
    redis: Any
    namespace: str
    history: RedisHistory

    async def pass_time(self, seconds):
        """Redis has no clock to advance, so everything is shortened instead."""
        async for key in self.redis.scan_iter(f"{{{self.namespace}:*"):
            left_ms = await self.redis.pttl(key)
            assert left_ms >= 0, "everything has a TTL"
            await self.redis.pexpire(key, max(0, left_ms - round(seconds * 1000)))

    async def keys(self) -> list[bytes]:
        return [key async for key in self.redis.scan_iter(f"{{{self.namespace}:*")]


@pytest.fixture(params=["memory", *KINDS])
async def store(request, redis_url):
    if request.param == "memory":
        clock = ManualClock()
        yield MemoryStore(clock, MemoryHistory(clock, ttl_s=TTL_S, kept_max=KEPT_MAX))
        return
    url, namespace = redis_url(request.param), uuid.uuid4().hex
    history = RedisHistory(url, ttl_s=TTL_S, kept_max=KEPT_MAX, timeout_s=10.0, namespace=namespace)
    async with client_of(url, request.param) as client:
        yield RedisStore(client, namespace, history)
    await history.close()


@pytest.fixture
def history(store) -> History:
    return store.history


class TestHistory:
    async def test_what_was_stored_is_there(self, history) -> None:
        await history.put("me", "a", b"\x00 an answer \xff")
        assert await history.get("me", "a") == b"\x00 an answer \xff"
        assert await history.get("me", "b") is None

    async def test_nobody_else_can_read_or_delete_it(self, history) -> None:
        await history.put("me", "a", b"mine")
        assert await history.get("you", "a") is None
        assert not await history.delete("you", "a")
        assert await history.get("me", "a") == b"mine"

    async def test_of_one_id_the_latest_is_kept(self, history) -> None:
        await history.put("me", "a", b"old")
        await history.put("me", "a", b"new")
        assert await history.get("me", "a") == b"new"

    async def test_it_goes_when_it_is_deleted(self, history) -> None:
        await history.put("me", "a", b"mine")
        assert await history.delete("me", "a")
        assert await history.get("me", "a") is None
        assert not await history.delete("me", "a")

    async def test_it_goes_when_its_time_is_over(self, store, history) -> None:
        await history.put("me", "a", b"mine")
        await store.pass_time(TTL_S - 1)
        assert await history.get("me", "a") == b"mine"
        await store.pass_time(2)
        assert await history.get("me", "a") is None
        assert not await history.delete("me", "a")

    async def test_the_oldest_go_when_an_owner_has_too_many(self, history) -> None:
        await history.put("you", "a", b"yours")
        for name in "abcde":
            await history.put("me", name, name.encode())
        assert [await history.get("me", name) for name in "abcde"] == [None, None, b"c", b"d", b"e"]
        assert await history.get("you", "a") == b"yours"


@pytest.mark.parametrize("store", KINDS, indirect=True)
class TestRedisHistory:
    async def test_nothing_is_left_when_all_has_expired(self, store, history) -> None:
        for name in "abcde":
            await history.put("me", name, b"x")
        assert len(await store.keys()) == KEPT_MAX + 1
        await store.pass_time(TTL_S + 1)
        assert await store.keys() == []


async def test_without_a_server_every_call_says_so() -> None:
    history = RedisHistory("redis://127.0.0.1:1", ttl_s=TTL_S, timeout_s=0.5)
    for call in (history.put("me", "a", b""), history.get("me", "a"), history.delete("me", "a")):
        with pytest.raises(StoreUnavailable):
            await call
    await history.close()
