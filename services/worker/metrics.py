"""What a worker shows Prometheus. One registry per object, so that tests can make several."""

from collections.abc import Callable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from services.core.errors import DiptychError, facts
from services.core.worker_report import State
from services.engine.messages import Gauges, Report
from services.transfer.fetch import PrefixFetched
from services.transfer.lease import LeaseEnd
from services.transfer.receive import Received

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class WorkerMetrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._engine = _EngineSeries(registry)
        self._transfer = _TransferSeries(registry)
        self._fetch = _FetchSeries(registry)
        self._failures = Counter(
            "diptych_worker_failures", "Sequences failed, by error", ["error"], registry=registry
        )
        self.epochs = Counter(
            "diptych_worker_epochs", "New epochs after the worker had stood still", registry=registry
        )
        self.engine_overdue = Counter(
            "diptych_worker_engine_overdue", "Times the engine was overdue", registry=registry
        )
        self.handovers = Counter(
            "diptych_worker_handovers", "Sequences handed over by a drain", registry=registry
        )

    def on_report(self, report: Report) -> None:
        self._engine.observe(report)

    def on_received(self, received: Received) -> None:
        self._transfer.bytes.labels("received").inc(received.bytes)
        self._transfer.seconds.observe(received.transfer_ms / 1e3)
        self._transfer.exposed_seconds.observe(received.exposed_ms / 1e3)

    def on_pull_broke(self, error: DiptychError) -> None:
        self._transfer.broken.labels(facts(error).label).inc()

    def on_prefix_fetched(self, fetched: PrefixFetched) -> None:
        self._fetch.tokens.inc(fetched.tokens)
        self._fetch.bytes.inc(fetched.bytes)
        self._fetch.seconds.observe(fetched.ms / 1e3)
        if fetched.error:
            self._fetch.failures.labels(facts(fetched.error).label).inc()

    def on_sent(self, sent_bytes: int) -> None:
        self._transfer.bytes.labels("sent").inc(sent_bytes)

    def on_lease_end(self, how: LeaseEnd) -> None:
        self._transfer.leases_ended.labels(how).inc()

    def on_failed(self, error: DiptychError) -> None:
        self._failures.labels(facts(error).label).inc()

    def watch_state(self, state: Callable[[], State]) -> None:
        """1 for the state that `state` tells, 0 for the others."""
        gauge = Gauge("diptych_worker_state", "The worker's state", ["state"], registry=self.registry)

        def watch(one: State) -> None:
            gauge.labels(one).set_function(lambda: float(state() == one))

        for one in get_args(State):
            watch(one)

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, help_text, registry=self.registry).set_function(value)


class _EngineSeries:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._last = Gauges()
        # Looking a label up takes as long as setting its value: this happens at every step.
        blocks = Gauge("diptych_worker_blocks", "KV blocks by state", ["state"], registry=registry)
        self._free, self._cached, self._used = map(blocks.labels, ("free", "cached", "used"))
        sequences = Gauge("diptych_worker_sequences", "Sequences by state", ["state"], registry=registry)
        self._running, self._waiting = map(sequences.labels, ("running", "waiting"))
        self._queued = Gauge(
            "diptych_worker_queued_prefill_tokens", "Tokens known but not computed", registry=registry
        )
        self._step_seconds = Histogram(
            "diptych_worker_step_seconds", "One run of the model", buckets=_SECONDS, registry=registry
        )
        batch = Histogram(
            "diptych_worker_batch_tokens", "Tokens in a step", ["kind"], buckets=_TOKENS, registry=registry
        )
        self._prefilled, self._decoded = map(batch.labels, ("prefill", "decode"))
        self._prompt = Counter("diptych_worker_prompt_tokens", "Prompt tokens admitted", registry=registry)
        self._hits = Counter(
            "diptych_worker_prefix_hit_tokens", "Prompt tokens found in the prefix cache", registry=registry
        )
        self._preemptions = Counter("diptych_worker_preemptions", "Sequences preempted", registry=registry)

    def observe(self, report: Report) -> None:
        gauges, last = report.gauges, self._last
        self._free.set(gauges.blocks_free)
        self._cached.set(gauges.blocks_cached)
        self._used.set(gauges.blocks_total - gauges.blocks_free - gauges.blocks_cached)
        self._running.set(gauges.running)
        self._waiting.set(gauges.waiting)
        self._queued.set(gauges.queued_prefill_tokens)
        self._prompt.inc(gauges.prompt_tokens - last.prompt_tokens)
        self._hits.inc(gauges.prefix_hit_tokens - last.prefix_hit_tokens)
        self._preemptions.inc(gauges.preemptions - last.preemptions)
        self._last = gauges
        if step := report.step:
            self._step_seconds.observe(step.seconds)
            # The histogram's sum is the count of tokens computed, by kind.
            for series, tokens in (
                (self._prefilled, step.prefill_tokens),
                (self._decoded, step.decode_tokens),
            ):
                if tokens:
                    series.observe(tokens)


class _TransferSeries:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.bytes = Counter("diptych_transfer_bytes", "KV bytes moved", ["direction"], registry=registry)
        self.seconds = Histogram(
            "diptych_transfer_seconds",
            "A KV transfer, from its opening to the confirmed lease",
            buckets=_SECONDS,
            registry=registry,
        )
        self.exposed_seconds = Histogram(
            "diptych_transfer_exposed_seconds",
            "The part of a KV transfer after the end of its prefill",
            buckets=_SECONDS,
            registry=registry,
        )
        self.broken = Counter(
            "diptych_transfer_broken",
            "Pulls that broke and went on from where they were, by error",
            ["error"],
            registry=registry,
        )
        self.leases_ended = Counter(
            "diptych_worker_leases_ended", "KV leases ended, by how", ["how"], registry=registry
        )


class _FetchSeries:
    """Prefixes fetched from other workers' caches."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens = Counter(
            "diptych_fetch_tokens", "Prompt tokens fetched instead of computed", registry=registry
        )
        self.bytes = Counter("diptych_fetch_bytes", "Their KV", registry=registry)
        self.seconds = Histogram(
            "diptych_fetch_seconds", "A fetch, well ended or not", buckets=_SECONDS, registry=registry
        )
        self.failures = Counter(
            "diptych_fetch_failures",
            "Fetches that brought less than was hoped for, by error",
            ["error"],
            registry=registry,
        )
