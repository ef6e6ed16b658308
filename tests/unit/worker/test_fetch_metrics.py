"""What an operator sees of prefix fetches."""

from services.core.errors import KvStale
from services.transfer.fetch import PrefixFetched
from services.worker.metrics import WorkerMetrics


def test_fetches_are_counted_in_tokens_and_bytes_and_failures_by_error() -> None:
    metrics = WorkerMetrics()
    metrics.on_prefix_fetched(PrefixFetched(tokens=64, bytes=1_000, ms=20.0, error=None))
    metrics.on_prefix_fetched(PrefixFetched(tokens=16, bytes=250, ms=40.0, error=KvStale("reused")))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"diptych_fetch_{name}", labels)

    assert (value("tokens_total"), value("bytes_total")) == (80, 1_250)
    assert (value("seconds_count"), value("seconds_sum")) == (2, 0.06)
    assert value("failures_total", error="kv_stale") == 1
