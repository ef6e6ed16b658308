"""The faults of the in-memory membership behave like those of the real store."""

import pytest

from services.core.clock import ManualClock
from services.core.errors import StoreUnavailable
from services.membership.memory_membership import MemoryMembership


async def test_every_call_fails_while_it_is_unavailable_and_works_afterwards(report):
    membership = MemoryMembership(ManualClock())
    await membership.announce(report("a"))
    membership.available = False
    for call in (membership.workers(), membership.announce(report("b")), membership.leave(report("a").key)):
        with pytest.raises(StoreUnavailable):
            await call
    membership.available = True
    assert await membership.workers() == [report("a")]


async def test_a_restart_of_the_store_forgets_everybody_until_they_announce_again(report):
    membership = MemoryMembership(ManualClock())
    await membership.announce(report("a"))
    membership.lose_everything()
    assert await membership.workers() == []
    await membership.announce(report("a"))
    assert await membership.workers() == [report("a")]
