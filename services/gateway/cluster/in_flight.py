"""Work that this gateway has sent to workers and that their reports do not show, or show no longer rightly.

Without it, all requests of a burst would be routed by the same old snapshot and pile on one worker.

    what a worker has to do  =  its last report, the queue less what was worked off since
                              + our parts that no report has named yet (WorkerReport.newest)
                              - our parts that one has named and that have ended since the last one

So a part counts once, whenever it reaches the worker's engine and however old a report is. When Redis is
away and no report comes, the queue of the last one runs out. Once it is too old to say anything, what counts
are our own prompts that wait for their first token and our own sequences.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from router.state import Offer, Route, WorkerView
from router.step_model import context_of
from services.core.clock import Clock
from services.core.worker_report import WorkerReport, sequence_tag

# A worker reports every 250 ms at least. A part that no report has named for so long, while reports came,
# was not named because too many others came with it.
UNNAMED_S = 2.0


@dataclass(slots=True, eq=False, kw_only=True)
class Part:
    """Of one attempt: what one worker has to do."""

    worker_id: str
    tag: int
    sent_at: float
    prefill_tokens: int = 0  # T and X of the step model; 0 once the first token is here
    prefill_context: int = 0
    sequences: int = 0  # that will decode
    context: int = 0  # of them
    blocks: int = 0
    reported: bool = False

    def prefilled(self) -> None:
        """The first token is here; what a prefill worker keeps of the prompt is cache, or soon will be."""
        self.prefill_tokens = self.prefill_context = 0
        if not self.sequences:
            self.blocks = 0


@dataclass(slots=True)
class _OnWorker:
    parts: list[Part] = field(default_factory=list)
    # Of parts that ended since the last report, which counts them:
    ended_sequences: int = 0
    ended_context: int = 0
    ended_blocks: int = 0


class InFlight:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._workers: dict[str, _OnWorker] = {}

    @property
    def parts(self) -> list[Part]:
        return [part for worker in self._workers.values() for part in worker.parts]

    @contextmanager
    def sent(self, route: Route, seq_id: str, known_tokens: int, choices: int) -> Iterator[Part]:
        """Count the parts of `route` from now until the block ends. It gets the part that computes the
        prompt, to tell it when the first token is here."""
        tag, now = sequence_tag(seq_id), self._clock.now()
        parts = [_part(offer, tag, now, known_tokens, choices) for offer in route.chosen]
        for part in parts:
            self._workers.setdefault(part.worker_id, _OnWorker()).parts.append(part)
        try:
            yield parts[0]
        finally:
            for part in parts:
                self._end(part)

    def heard(self, report: WorkerReport) -> None:
        """A report that is newer than the last one of its worker has come."""
        if (worker := self._workers.get(report.worker_id)) is None:
            return
        newest, now = set(report.newest), self._clock.now()
        for part in worker.parts:
            part.reported = part.reported or part.tag in newest or now - part.sent_at > UNNAMED_S
        if worker.parts:
            worker.ended_sequences = worker.ended_context = worker.ended_blocks = 0
        else:
            del self._workers[report.worker_id]

    def lost(self, worker_id: str) -> None:
        """The worker has left the cluster."""
        if worker := self._workers.get(worker_id):
            worker.ended_sequences = worker.ended_context = worker.ended_blocks = 0
            for part in worker.parts:
                part.reported = False
            if not worker.parts:
                del self._workers[worker_id]

    def applied_to(self, view: WorkerView, age_s: float) -> WorkerView:
        """What the worker has to do now: `view` shows what its report of `age_s` ago said."""
        view = _worked_off(view, age_s)
        if (worker := self._workers.get(view.id)) is None:
            return view
        if worker.ended_blocks:
            view = replace(
                view,
                running=max(0, view.running - worker.ended_sequences),
                running_context=max(0, view.running_context - worker.ended_context),
                blocks_available=view.blocks_available + worker.ended_blocks,
            )
        return _with_parts(view, [part for part in worker.parts if not part.reported])

    def alone_on(self, idle: WorkerView) -> WorkerView:
        """What the worker has to do if nothing is known but what we have sent; `idle` shows it without."""
        return _with_parts(idle, self._workers.get(idle.id, _OnWorker()).parts)

    def _end(self, part: Part) -> None:
        worker = self._workers[part.worker_id]
        worker.parts.remove(part)
        if part.reported:
            worker.ended_sequences += part.sequences
            worker.ended_context += part.context
            worker.ended_blocks += part.blocks
        elif not worker.parts and not worker.ended_blocks:
            del self._workers[part.worker_id]


def _part(offer: Offer, tag: int, now: float, known_tokens: int, choices: int) -> Part:
    sequences = choices if offer.part != "prefill" else 0
    to_compute = known_tokens - offer.ready_tokens if offer.part != "decode" else 0
    return Part(
        worker_id=offer.worker.id,
        tag=tag,
        sent_at=now,
        prefill_tokens=to_compute,
        prefill_context=context_of(to_compute, known_tokens - to_compute),
        sequences=sequences,
        context=sequences * known_tokens,
        blocks=-(-known_tokens // offer.worker.block_size) + max(sequences, 1),
    )


def _with_parts(view: WorkerView, parts: Sequence[Part]) -> WorkerView:
    if not parts:
        return view
    return replace(
        view,
        queued_prefill_tokens=view.queued_prefill_tokens + sum(part.prefill_tokens for part in parts),
        queued_prefill_context=view.queued_prefill_context + sum(part.prefill_context for part in parts),
        waiting=view.waiting + sum(part.prefill_tokens > 0 for part in parts if not part.sequences),
        running=view.running + sum(part.sequences for part in parts),
        running_context=view.running_context + sum(part.context for part in parts),
        blocks_available=max(0, view.blocks_available - sum(part.blocks for part in parts)),
    )


def _worked_off(view: WorkerView, age_s: float) -> WorkerView:
    """`view` with its queue of prompts less what the worker has computed of it in the meantime. One that
    decodes as well is not foreseen: its prompts get what decoding leaves."""
    if view.model is None or not view.queued_prefill_tokens or view.running_context:
        return view
    tokens, context = view.queued_prefill_tokens, view.queued_prefill_context
    queue_ms = view.model.queue_ms(tokens, context, view.chunk_tokens)
    left = max(0.0, 1.0 - age_s * 1e3 / queue_ms) if queue_ms > 0 else 1.0
    return replace(
        view,
        queued_prefill_tokens=round(tokens * left),
        queued_prefill_context=round(context * left),
    )
