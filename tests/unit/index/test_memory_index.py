"""The faults of the in-memory index behave like those of the real store."""

import pytest

from services.core.clock import ManualClock
from services.core.errors import StoreFull, StoreUnavailable
from services.core.worker_report import WorkerKey
from services.index.memory_index import MemoryPrefixIndex

A = WorkerKey("a", 1)
CHAIN = [bytes([number]) * 16 for number in range(6)]


async def test_every_call_fails_while_it_is_unavailable_and_works_afterwards():
    index = MemoryPrefixIndex(ManualClock())
    await index.begin(A)
    await index.publish(A, CHAIN[:2], [])
    index.available = False
    calls = (
        *(index.locate(CHAIN, [A]), index.renew(A), index.forget(A)),
        *(index.begin(A), index.publish(A, CHAIN, [])),
    )
    for call in calls:
        with pytest.raises(StoreUnavailable):
            await call
    index.available = True
    assert await index.locate(CHAIN, [A]) == {A: 2}


async def test_a_full_index_refuses_more_blocks_and_still_does_everything_else():
    index = MemoryPrefixIndex(ManualClock())
    index.blocks_max = 1
    await index.begin(A)
    await index.publish(A, CHAIN[:2], [])
    with pytest.raises(StoreFull):
        await index.publish(A, CHAIN[2:3], [])
    assert await index.renew(A)
    assert await index.publish(A, [], CHAIN[1:2])
    assert await index.locate(CHAIN, [A]) == {A: 1}
