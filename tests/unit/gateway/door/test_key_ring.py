"""A gateway goes on with the keys it knew, whatever happens to where they are kept."""

import asyncio
import logging
from datetime import UTC, datetime

import pytest

from services.core.clock import ManualClock
from services.core.errors import ConfigError, InvalidKey, StoreUnavailable
from services.gateway.door.key_ring import POLL_S, KeyRing
from services.keys import changes
from services.keys.file_keys import FileKeys
from services.keys.memory_keys import MemoryKeys

NOW = datetime(2026, 11, 26, tzinfo=UTC)


class Ring:
    def __init__(self) -> None:
        self.store, self.clock = MemoryKeys(), ManualClock()
        self.ring = KeyRing(self.store, self.clock, lambda: NOW)

    async def create(self, name: str = "alice") -> bytes:
        return (await changes.create(self.store, name, NOW))[1].encode()

    def knows(self, key: bytes) -> bool:
        try:
            return bool(self.ring.tenant_of(key))
        except InvalidKey:
            return False


@pytest.fixture
def ring() -> Ring:
    return Ring()


def break_document(ring: Ring) -> None:
    ring.store.put(b"{broken")


def lose_document(ring: Ring) -> None:
    ring.store.lose_everything()


def switch_off(ring: Ring) -> None:
    ring.store.available = False


@pytest.mark.parametrize("trouble", [break_document, lose_document, switch_off])
async def test_the_last_good_keys_stay_and_the_log_says_so_once(ring, caplog, trouble) -> None:
    key, document = await ring.create(), ring.store.document
    await ring.ring.open()
    trouble(ring)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            await ring.ring.refresh()
    assert ring.knows(key)
    (record,) = caplog.records
    assert (record.levelname, "the last known 1 API keys stay in force" in record.message) == (
        "WARNING",
        True,
    )
    caplog.clear()
    ring.store.available = True
    ring.store.put(document)
    with caplog.at_level(logging.INFO):
        await ring.ring.refresh()
    assert "the API keys can be read again" in caplog.text
    assert ring.knows(key)


async def test_a_broken_document_at_the_start_is_a_configuration_error(ring) -> None:
    break_document(ring)
    with pytest.raises(ConfigError, match="line 1"):
        await ring.ring.open()


async def test_before_keys_were_read_nobody_is_refused_for_a_wrong_one(ring) -> None:
    key = await ring.create()
    switch_off(ring)
    await ring.ring.open()
    with pytest.raises(StoreUnavailable):
        ring.ring.tenant_of(key)


async def test_changes_are_seen_within_the_poll(ring) -> None:
    await ring.ring.open()
    following = asyncio.create_task(ring.ring.follow())
    key = await ring.create()
    async with asyncio.timeout(10):
        while not ring.knows(key):
            await asyncio.sleep(0)
            ring.clock.advance(POLL_S / 4)
    await changes.revoke(ring.store, "alice", NOW)
    async with asyncio.timeout(10):
        while ring.knows(key):
            await asyncio.sleep(0)
            ring.clock.advance(POLL_S / 4)
    following.cancel()


async def test_no_keys_at_all_are_worth_a_warning(ring, caplog) -> None:
    await ring.ring.open()
    assert "every request is refused until `diptych keys create`" in caplog.text


async def test_a_file_that_is_edited_counts_and_a_broken_one_does_not(tmp_path) -> None:
    path = tmp_path / "keys.jsonl"
    store = FileKeys(path)
    _, key = await changes.create(store, "alice", NOW)
    ring = KeyRing(store, ManualClock(), lambda: NOW)
    await ring.open()
    good = path.read_text()
    for broken in (good + "x", "", good[: len(good) // 2]):
        path.write_text(broken)
        await ring.refresh()
        assert ring.tenant_of(key.encode()).name == "alice"
    path.write_text(good.replace('"alice"', '"alicia"'))
    await ring.refresh()
    assert ring.tenant_of(key.encode()).name == "alicia"
    path.unlink()
    await ring.refresh()
    assert ring.tenant_of(key.encode()).name == "alicia"
