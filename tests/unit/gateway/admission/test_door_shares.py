"""Of those who are refused, one that got more in than the others is let in less easily."""

import pytest

from services.core.clock import ManualClock
from services.gateway.admission.door_shares import REMEMBERED_S, TENANTS_KEPT, DoorShares
from services.gateway.admission.fair_queue import Priority

NORMAL = Priority.NORMAL


def crowded(clock: ManualClock, **let_in: int) -> DoorShares:
    """Tenants who were all refused something, and let in with so many tokens."""
    shares = DoorShares(clock)
    for tenant, tokens in let_in.items():
        shares.note(NORMAL, tenant, tokens, let_in=True)
        shares.note(NORMAL, tenant, 100, let_in=False)
    return shares


def test_whoever_got_more_than_the_average_may_use_less_of_its_time() -> None:
    shares = crowded(ManualClock(), much=900, little=300)
    assert shares.share(NORMAL, "little") == 1.0
    assert shares.share(NORMAL, "much") == pytest.approx((600 / 900) ** 2)
    assert shares.share(NORMAL, "new") == 1.0
    assert shares.share(Priority.LOW, "much") == 1.0, "classes are apart"


def test_a_tenant_alone_and_one_whose_rivals_want_nothing_may_use_all() -> None:
    assert crowded(ManualClock(), only=900).share(NORMAL, "only") == 1.0
    shares = crowded(ManualClock(), much=900)
    shares.note(NORMAL, "content", 10, let_in=True)
    assert shares.share(NORMAL, "much") == 1.0


def test_what_was_long_ago_is_forgotten() -> None:
    clock = ManualClock()
    shares = crowded(clock, much=900, little=300)
    clock.advance(REMEMBERED_S)
    shares.note(NORMAL, "little", 150, let_in=True)
    assert shares.share(NORMAL, "much") == pytest.approx((375 / 450) ** 2)
    clock.advance(20 * REMEMBERED_S)
    assert shares.share(NORMAL, "much") == 1.0


def test_tenants_are_remembered_in_bounded_number() -> None:
    shares = DoorShares(ManualClock())
    for number in range(TENANTS_KEPT + 100):
        shares.note(NORMAL, f"t{number}", 1, let_in=True)
    assert len(shares._recent) == TENANTS_KEPT
