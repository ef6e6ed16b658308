"""What changes with every token: plain numbers, made into Prometheus' metrics when somebody asks.

prometheus_client's own objects take locks, which one event loop does not need: about 4 us for each token.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)


class TokenMetrics(Collector):
    def __init__(self) -> None:
        self._tokens = 0
        self._gaps = [0] * (len(_BUCKETS) + 1)  # by the bucket that they fall into
        self._gaps_s = 0.0

    def count(self) -> None:
        """A token for a client."""
        self._tokens += 1

    def note_gap(self, seconds: float) -> None:
        """Between two tokens of one answer."""
        self._gaps[bisect_left(_BUCKETS, seconds)] += 1
        self._gaps_s += seconds

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "diptych_gateway_completion_tokens", "Tokens generated for clients", value=self._tokens
        )
        bounds = [*map(floatToGoString, _BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "diptych_gateway_inter_token_seconds",
            "Between two tokens of an answer",
            buckets=[*zip(bounds, accumulate(self._gaps), strict=True)],
            sum_value=self._gaps_s,
        )
