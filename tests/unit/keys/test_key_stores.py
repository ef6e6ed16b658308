"""What every KeyStore promises, proven for the in-memory twin, files, and real servers alike."""

import asyncio
import os
import uuid
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from services.core.errors import ConfigError, StoreUnavailable
from services.keys import changes
from services.keys.api_key import KeyLimits
from services.keys.document import encoded
from services.keys.file_keys import FileKeys
from services.keys.memory_keys import MemoryKeys
from services.keys.open_keys import open_keys
from services.keys.protocol import NOTHING_KEPT
from services.keys.redis_keys import RedisKeys
from services.store.embedded import EmbeddedValkey
from tests.support.redis_servers import KINDS, client_of
from tests.unit.keys.test_api_key import NOW, record


@asynccontextmanager
async def opened(kind, redis_url, folder):
    """A store, and a way to put a document there that no command of ours wrote."""
    if kind == "memory":
        store = MemoryKeys()

        async def put(document):
            store.put(document)

        yield store, put
    elif kind == "file":
        path = folder / "keys.jsonl"

        async def put(document):
            path.write_bytes(document)

        yield FileKeys(path), put
    else:
        url, namespace = redis_url(kind), uuid.uuid4().hex
        store = RedisKeys(url, timeout_s=10.0, namespace=namespace)
        async with client_of(url, kind) as client:

            async def put(document):
                await client.hset(f"{{{namespace}:keys}}", mapping={"version": "edited", "keys": document})

            yield store, put
        await store.close()


@pytest.fixture(params=["memory", "file", *KINDS])
async def opened_store(request, redis_url, tmp_path):
    async with opened(request.param, redis_url, tmp_path) as store:
        yield store


@pytest.fixture
def store(opened_store):
    return opened_store[0]


@pytest.fixture
def put(opened_store):
    return opened_store[1]


async def names(store) -> list[str]:
    return [key.name for key in (await store.read()).keys]


class TestKeyStore:
    async def test_at_first_there_are_no_keys(self, store) -> None:
        assert await store.read() == (NOTHING_KEPT, ())
        assert await store.read(unless=NOTHING_KEPT) is None

    async def test_what_was_written_is_read_until_it_is_replaced(self, store) -> None:
        one, other = record()[0], record("bob", limits=KeyLimits(concurrent=2))[0]
        assert await store.write((one,), after=NOTHING_KEPT)
        first = await store.read()
        assert first.keys == (one,)
        assert await store.write((one, other), after=first.version)
        assert (await store.read(unless=first.version)).keys == (one, other)

    async def test_keys_that_have_not_changed_are_not_read_again(self, store) -> None:
        assert await store.write((record()[0],), after=NOTHING_KEPT)
        assert await store.read(unless=(await store.read()).version) is None

    async def test_who_has_not_seen_the_last_version_changes_nothing(self, store) -> None:
        one = record()[0]
        assert await store.write((one,), after=NOTHING_KEPT)
        assert not await store.write((), after=NOTHING_KEPT)
        assert (await store.read()).keys == (one,)

    async def test_a_document_of_somebody_else_is_seen(self, store, put) -> None:
        version = (await store.read()).version
        await put(encoded((record("edited")[0],)))
        assert [key.name for key in (await store.read(unless=version)).keys] == ["edited"]

    async def test_a_broken_document_is_an_error_and_never_no_keys(self, store, put) -> None:
        await put(b"{broken\n")
        with pytest.raises(ConfigError, match="line 1"):
            await store.read()

    async def test_changes_at_the_same_time_all_count(self, store) -> None:
        wanted = [f"key{number}" for number in range(8)]
        await asyncio.gather(*(changes.create(store, name, NOW) for name in wanted))
        assert sorted(await names(store)) == wanted


class TestChanges:
    async def test_a_created_key_is_kept_as_a_record_of_it(self, store) -> None:
        limits = KeyLimits(requests_per_minute=5)
        key, secret = await changes.create(store, "alice", NOW, limits=limits, priority="high", admin=True)
        assert (await store.read()).keys == (key,)
        assert key.is_of(secret.encode())
        assert (key.limits, key.priority, key.admin, key.created) == (limits, "high", True, NOW)

    async def test_two_keys_in_use_have_two_names(self, store) -> None:
        await changes.create(store, "alice", NOW)
        with pytest.raises(ConfigError, match="'alice'"):
            await changes.create(store, "alice", NOW)
        await changes.revoke(store, "alice", NOW)
        await changes.create(store, "alice", NOW)
        assert await names(store) == ["alice", "alice"]

    @pytest.mark.parametrize("name", ["", "a b", "ä", "-x", "a" * 65, "x\n", 'a"b'])
    async def test_a_name_that_could_not_be_a_label_is_refused(self, store, name) -> None:
        with pytest.raises(ConfigError):
            await changes.create(store, name, NOW)
        assert await names(store) == []

    async def test_a_revoked_key_stays_as_a_record_and_is_revoked_once(self, store) -> None:
        key, _ = await changes.create(store, "alice", NOW)
        await changes.revoke(store, key.id, NOW)
        assert [one.revoked for one in (await store.read()).keys] == [NOW]
        for change in (changes.revoke, changes.rotate):
            with pytest.raises(ConfigError, match="alice"):
                await change(store, "alice", NOW)

    async def test_a_rotated_key_keeps_all_but_the_key(self, store) -> None:
        key, secret = await changes.create(store, "alice", NOW, limits=KeyLimits(concurrent=1))
        rotated, fresh = await changes.rotate(store, "alice", NOW)
        assert (await store.read()).keys == (rotated,)
        assert (rotated.id, rotated.salt, rotated.limits) == (key.id, key.salt, key.limits)
        assert rotated.is_of(fresh.encode())
        assert not rotated.is_of(secret.encode())

    async def test_keys_share_cached_prompts_only_in_a_group(self, store) -> None:
        made = [
            (await changes.create(store, f"key{number}", NOW, cache_group=group))[0]
            for number, group in enumerate(("team", "team", "others", None, None))
        ]
        assert made[0].salt == made[1].salt
        assert len({key.salt for key in made}) == 4

    async def test_a_change_of_one_limit_leaves_the_others(self, store) -> None:
        await changes.create(store, "alice", NOW, limits=KeyLimits(1, 2, 3))
        changed = await changes.change(
            store, "alice", NOW, limits={"tokens_per_minute": None, "concurrent": 9}, priority="low"
        )
        assert (await store.read()).keys == (changed,)
        assert (changed.limits, changed.priority) == (KeyLimits(1, None, 9), "low")

    async def test_records_that_ended_long_ago_go_with_the_next_change(self, store) -> None:
        await changes.create(store, "old", NOW)
        await changes.revoke(store, "old", NOW)
        await changes.create(store, "new", NOW + timedelta(days=91))
        assert await names(store) == ["new"]


def test_a_file_of_keys_is_readable_by_its_owner_alone_and_nothing_else_is_left(tmp_path) -> None:
    path = tmp_path / "keys.jsonl"
    old_mask = os.umask(0)
    try:
        asyncio.run(changes.create(FileKeys(path), "alice", NOW))
    finally:
        os.umask(old_mask)
    assert path.stat().st_mode & 0o777 == 0o600
    assert {one.name for one in tmp_path.iterdir()} == {"keys.jsonl", "keys.jsonl.lock"}


async def test_a_file_that_cannot_be_read_is_unavailable_and_one_that_cannot_be_written_an_error(tmp_path):
    with pytest.raises(StoreUnavailable):
        await FileKeys(tmp_path).read()
    with pytest.raises(ConfigError):
        await FileKeys(tmp_path / "missing" / "keys.jsonl").write((), after=NOTHING_KEPT)


async def test_a_redis_that_is_gone_is_unavailable() -> None:
    with EmbeddedValkey() as server:
        store = RedisKeys(server.url, timeout_s=1.0)
        await changes.create(store, "alice", datetime.now(UTC))
    with pytest.raises(StoreUnavailable):
        await store.read()
    await store.close()


async def test_a_setting_names_its_store(tmp_path) -> None:
    assert isinstance(open_keys(f"file:{tmp_path}/k", ""), FileKeys)
    store = open_keys("redis", "redis://127.0.0.1:1")
    assert isinstance(store, RedisKeys)
    await store.close()
    for wrong in ("file:", "keys.jsonl", "redis:x", "sql"):
        with pytest.raises(ConfigError, match="file:PATH"):
            open_keys(wrong, "redis://127.0.0.1:1")
    with pytest.raises(ConfigError, match="--redis"):
        open_keys("redis", "")
