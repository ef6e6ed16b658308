"""What a chaos run asks covers every way to want several choices, and a short run has some too."""

import random

from tests.chaos.test_chaos import FORTY_SECONDS
from tests.chaos.workload import CHOICES_MAX, KINDS, draw_pool


def test_each_kind_of_sampling_has_requests_with_several_choices() -> None:
    several = [
        ask for ask in draw_pool(FORTY_SECONDS.pool, random.Random(FORTY_SECONDS.seed)) if ask.choices > 1
    ]
    assert {ask.kind for ask in several} == set(KINDS)
    assert all(2 <= ask.choices <= CHOICES_MAX for ask in several)


def test_several_choices_are_streamed_and_end_at_stop_strings_too() -> None:
    several = [ask.body for ask in draw_pool(60, random.Random(1)) if ask.choices > 1]
    assert any(body.get("stream") and "stop" in body for body in several)
    assert any("stream" not in body for body in several)
    assert any("ignore_eos" in body for body in several)
