"""A gateway's queue and what it stands on, over in-memory twins and without HTTP: for tests of its parts."""

import random
from collections.abc import Iterable

from router.state import RouteOptions
from services.core.clock import Clock, ManualClock
from services.core.sampling import SamplingParams
from services.core.worker_report import WorkerReport
from services.gateway.admission.admission import Admission, AdmissionLimits
from services.gateway.admission.fair_queue import Priority
from services.gateway.admission.place_queue import PlaceQueue, WaitLimits
from services.gateway.admission.places import PlaceLimits, Places
from services.gateway.admission.ticket import Ticket
from services.gateway.cluster.cluster_view import ClusterView
from services.gateway.metrics import GatewayMetrics
from services.gateway.path.choices import Choices
from services.gateway.path.pipeline import Pipeline
from services.gateway.workers.memory_worker_client import MemoryWorkerClient
from services.gateway.workers.worker_client import Sequence
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from tests.unit.gateway.scripted_worker_server import report

FAR = 1e9  # no deadline in a test's life


def sequence(prompt_tokens: int = 3, choices: int = 1, **sampling) -> Sequence:
    return Sequence(
        request_id="r",
        attempt=1,
        prompt_ids=list(range(prompt_tokens)),
        output_ids=[],
        sampling=SamplingParams(**{"max_tokens": 3, **sampling}),
        choices=tuple(range(choices)),
    )


class GatewayParts:
    def __init__(
        self,
        clock: Clock,
        *,
        options: RouteOptions | None = None,
        places: PlaceLimits | None = None,
        waits: WaitLimits | None = None,
        admission: AdmissionLimits | None = None,
    ) -> None:
        self.clock = clock
        self.workers = MemoryWorkerClient(lambda prompt: [7, 8, 9])
        self.membership = MemoryMembership(clock, ttl_s=1e9)
        self.index = MemoryPrefixIndex(clock, ttl_s=1e9)
        served = report("w", "both").served_model
        self.view = ClusterView(self.membership, self.index, self.workers, clock, served)
        self.metrics = GatewayMetrics()
        options = options or RouteOptions(split="always")
        self.places = Places(self.view, options, places or PlaceLimits(), clock, random.Random(1))
        self.queue = PlaceQueue(self.places, self.view, waits or WaitLimits(), self.metrics, clock)
        self.view.on_refresh = self.queue.wake
        limits = admission or AdmissionLimits()
        self.admission = Admission(limits, self.queue, self.places, self.view, self.metrics, clock)
        self.pipeline = Pipeline(self.queue, self.view, self.workers, clock)

    async def hear(self, *reports: WorkerReport) -> None:
        for worker in reports:
            await self.membership.announce(worker)
        await self.view.refresh()

    def ticket(self, wanted: Sequence | None = None, excluded: Iterable = (), **changes) -> Ticket:
        wanted = sequence() if wanted is None else wanted
        values = {
            "choices": Choices(len(wanted.choices)),
            "tenant": "",
            "priority": Priority.NORMAL,
            "since": self.clock.now(),
            "deadline": FAR,
            "first_token_by": FAR,
            "avoided": lambda: set(excluded),
        }
        return Ticket(sequence=wanted, **{**values, **changes})

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics._registry.get_sample_value(f"diptych_gateway_{name}", labels)
        return value or 0.0


class JumpingClock(ManualClock):
    """Sleeping takes no time but its own."""

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
