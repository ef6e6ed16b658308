"""A cached prefix elsewhere: from the index over the route to the worker that may fetch it."""

import msgspec
import pytest

from router.state import RouteOptions
from services.core.block_hash import chain_hashes, chain_root
from services.core.clock import ManualClock, SystemClock
from services.core.sampling import SamplingParams
from services.gateway.metrics import GatewayMetrics
from services.gateway.path.generation import AttemptFailed, Routed
from services.gateway.path.journal import Journal
from services.gateway.workers.sequence_wire import event_from_wire, prefill_from_wire, sequence_to_wire
from services.gateway.workers.worker_client import PrefixSource, Sequence
from services.wire.generated import worker_pb2
from tests.unit.gateway.gateway_parts import GatewayParts
from tests.unit.gateway.scripted_worker_server import report

PROMPT = list(range(500))


def sequence(prefix: PrefixSource | None = None) -> Sequence:
    sampling = SamplingParams(max_tokens=3)
    return Sequence(
        request_id="r", attempt=1, prompt_ids=PROMPT, output_ids=[], sampling=sampling, prefix=prefix
    )


class Cluster(GatewayParts):
    """Prefill worker p, and decode workers d and warm; warm holds `cached` tokens of the prompt."""

    def __init__(self, **options) -> None:
        super().__init__(SystemClock(), options=RouteOptions(split="always", **options))
        self.reports = {
            "p": report("p", "prefill", address="p:1"),
            "d": report("d", "decode", address="d:1"),
            "warm": report("warm", "decode", address="warm:1", epoch=5, running=50),
        }

    async def attempt(self, cached: int, excluded=()) -> Routed:
        compatibility = self.reports["warm"].compatibility
        hashes = chain_hashes(PROMPT[:cached], compatibility.block_size, chain_root(compatibility))
        await self.index.begin(self.reports["warm"].key)
        await self.index.publish(self.reports["warm"].key, hashes, [])
        await self.hear(*self.reports.values())
        ticket = self.ticket(sequence(), excluded)
        events = [event async for burst in self.pipeline.attempt(ticket) for event in burst]
        assert not any(isinstance(event, AttemptFailed) for event in events)
        return events[0]

    @property
    def prefixes(self) -> list[PrefixSource | None]:
        return [call.sequence.prefix for call in self.workers.calls]


async def test_the_worker_that_computes_is_told_who_has_a_prefix() -> None:
    cluster = Cluster()
    await cluster.attempt(cached=400)
    assert cluster.prefixes[0] == PrefixSource(cluster.reports["warm"], 400)


async def test_workers_are_told_nothing_when_computing_is_as_good() -> None:
    cluster = Cluster()
    await cluster.attempt(cached=48)
    assert cluster.prefixes == [None, None]


async def test_fetching_can_be_turned_off() -> None:
    cluster = Cluster(fetch=False)
    await cluster.attempt(cached=400)
    assert cluster.prefixes == [None, None]


async def test_a_worker_that_failed_the_request_is_no_source() -> None:
    cluster = Cluster()
    await cluster.attempt(cached=400, excluded=[cluster.reports["warm"].key])
    assert cluster.prefixes == [None, None]


async def test_a_draining_worker_is_a_source_and_a_suspected_one_is_not() -> None:
    cluster = Cluster()
    cluster.reports["warm"] = msgspec.structs.replace(cluster.reports["warm"], state="draining")
    await cluster.attempt(cached=400)
    assert cluster.prefixes[0].worker.worker_id == "warm"
    cluster.view.suspect(cluster.reports["warm"].key)
    await cluster.attempt(cached=400)
    assert cluster.prefixes[2:] == [None, None]


async def test_tokens_to_be_fetched_do_not_count_as_work_in_flight() -> None:
    cluster = Cluster()
    placed = await cluster.attempt(cached=400)
    with cluster.view.in_flight.sent(placed.route, "r-1", len(PROMPT), 1):
        views = {view.id: view for view in cluster.view.worker_views()}
    assert views["p"].queued_prefill_tokens == 100


def test_the_source_travels_with_its_address_and_epoch() -> None:
    warm = report("warm", "decode", address="warm:1", epoch=5)
    wire = sequence_to_wire(sequence(PrefixSource(warm, 400)))
    source = worker_pb2.KvSource(worker_id="warm", address="warm:1", epoch=5)
    assert wire.prefix == worker_pb2.PrefixSource(worker=source, tokens=400)
    assert not sequence_to_wire(sequence()).HasField("prefix")


@pytest.mark.parametrize("alone", [False, True])
def test_timings_tell_what_was_fetched_and_how_long_it_took(alone: bool) -> None:
    started = worker_pb2.DecodeStarted(fetched_tokens=400, fetch_ms=12.5) if alone else None
    reply = worker_pb2.PrefillReply(fetched_tokens=400, fetch_ms=12.5)
    first = event_from_wire(worker_pb2.DecodeEvent(started=started)) if started else prefill_from_wire(reply)
    journal = Journal(ManualClock(100.0), GatewayMetrics(), 99.5)
    journal.record(first)
    assert (journal.timings.fetched_tokens, journal.timings.fetch) == (400, 12.5)


def test_what_was_fetched_counts_as_cached_in_the_usage() -> None:
    journal = Journal(ManualClock(100.0), GatewayMetrics(), 99.5)
    journal.admit(prompt_tokens=500, seed=1)
    journal.record(prefill_from_wire(worker_pb2.PrefillReply(cached_tokens=64, fetched_tokens=400)))
    assert journal.usage.prompt_tokens_details.cached_tokens == 464
