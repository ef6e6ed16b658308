"""The faults of the in-memory index behave like those of the real store."""

import pytest

from services.core.clock import ManualClock
from services.core.errors import StoreUnavailable
from services.core.worker_report import WorkerKey
from services.index.memory_index import MemoryPrefixIndex

A = WorkerKey("a", 1)
CHAIN = [bytes([number]) * 16 for number in range(6)]


async def test_every_call_fails_while_it_is_unavailable_and_works_afterwards():
    index = MemoryPrefixIndex(ManualClock())
    await index.publish(A, CHAIN[:2], [])
    index.available = False
    for call in (index.locate(CHAIN, [A]), index.renew(A), index.forget(A), index.publish(A, CHAIN, [])):
        with pytest.raises(StoreUnavailable):
            await call
    index.available = True
    assert await index.locate(CHAIN, [A]) == {A: 2}


async def test_an_increment_that_failed_is_not_covered_up_by_later_ones():
    index = MemoryPrefixIndex(ManualClock())
    await index.publish(A, CHAIN[:2], [])
    index.available = False
    with pytest.raises(StoreUnavailable):
        await index.publish(A, CHAIN[2:4], CHAIN[:1])
    index.available = True
    await index.publish(A, CHAIN[4:6], [])
    assert not await index.renew(A)
    await index.publish(A, CHAIN[:3], [])
    assert await index.renew(A)
    assert await index.locate(CHAIN, [A]) == {A: 3}
