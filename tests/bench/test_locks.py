"""The ratio of the locks' benchmark compares what was measured side by side."""

from tests.bench.locks import ratio


def test_each_round_is_compared_with_its_own() -> None:
    seen = {"none": [10.0, 100.0, 1.0], "token": [11.0, 120.0, 1.3]}
    assert ratio(seen, "token") == 1.2
    assert ratio(seen, "none") == 1.0
