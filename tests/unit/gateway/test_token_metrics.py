"""Our own counts of tokens beside prometheus_client's."""

import random

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from services.gateway.token_metrics import _BUCKETS, TokenMetrics


def test_the_page_is_the_one_that_prometheus_client_s_own_objects_give() -> None:
    ours, theirs, rng = CollectorRegistry(), CollectorRegistry(), random.Random(1)
    tokens = TokenMetrics()
    ours.register(tokens)
    counter = Counter("diptych_gateway_completion_tokens", "Tokens generated for clients", registry=theirs)
    gaps = Histogram(
        "diptych_gateway_inter_token_seconds",
        "Between two tokens of an answer",
        buckets=_BUCKETS,
        registry=theirs,
    )
    for gap_s in [*_BUCKETS, 0.0, 100.0, *(rng.expovariate(20) for _ in range(200))]:
        tokens.count()
        counter.inc()
        tokens.note_gap(gap_s)
        gaps.observe(gap_s)
    assert samples(ours) == samples(theirs)


def samples(registry: CollectorRegistry) -> list[str]:
    """All but when they were created."""
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]
