"""The gateway's Prometheus metrics: prefix diptych_gateway_, base units, labels from closed sets."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from services.core.stages import Stage
from services.gateway.key_metrics import KeyMetrics
from services.gateway.token_metrics import TokenMetrics

# From a cached token on a GPU (5 ms) to a long prompt behind a full queue on a small CPU (2 minutes).
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class GatewayMetrics:
    """One registry per gateway, so that tests can have several in a process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "diptych_gateway_requests",
            "Requests that ended, by endpoint and outcome: ok, cancelled or an error's label",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "diptych_gateway_stage_seconds",
            "Time a request spent in one visit of a stage",
            ["stage"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "diptych_gateway_time_to_first_token_seconds",
            "From receiving a request to its first token",
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.tokens = TokenMetrics()
        registry.register(self.tokens)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests with a first token")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens found in a prefix cache")
        self.inflight = Gauge("diptych_gateway_inflight", "Requests now in the gateway", registry=registry)
        self.body_bytes = Gauge(
            "diptych_gateway_body_bytes", "Of the bodies of requests now in the gateway", registry=registry
        )
        self.ready = Gauge(
            "diptych_gateway_ready", "1 while new requests should come here", registry=registry
        )
        self.queue_length = Gauge(
            "diptych_gateway_queue_length",
            "Requests that wait for a worker, by priority class",
            ["priority"],
            registry=registry,
        )
        self.queue_tokens = Gauge(
            "diptych_gateway_queue_tokens",
            "Tokens that those in the queue want computed, expected answers included, by priority class",
            ["priority"],
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "diptych_gateway_queue_seconds",
            "How long those who got a place had waited for it, by priority class",
            ["priority"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.rejections = Counter(
            "diptych_gateway_rejections",
            "Requests refused with 429 by this gateway, by reason (services/gateway/admission/admission.py)",
            ["reason"],
            registry=registry,
        )
        self.keys = KeyMetrics(registry)
        self.unauthorized = self._counter(
            "unauthorized", "Requests refused with 401: no API key, or a wrong one"
        )
        self.retries = Counter(
            "diptych_gateway_retries",
            "Attempts that failed and were followed by another, by the error's label",
            ["error"],
            registry=registry,
        )
        self.routes = Counter(
            "diptych_gateway_routes",
            "Attempts by kind of route: split, decode_alone or prefill_only",
            ["kind"],
            registry=registry,
        )

    def leave_stage(self, stage: Stage, seconds: float) -> None:
        self.stage_seconds.labels(stage.value).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(f"diptych_gateway_{name}", documentation, registry=self._registry)
