"""The life of one request in the simulated cluster, from its arrival to its last token.

    place ──┬─ split: D reserves ── P computes (── fetch) ── KV follows chunk by chunk ── Start ── tokens
            ├─ alone: D computes (── fetch) ── tokens
            └─ no room: it waits in the gateway's line and looks again

It follows services/prefill, services/decode and services/transfer: P gets no work before D has reserved,
KV streams while P computes, a fetch ends in the time that computing would take. Messages take NETWORK_S.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from services.core.sampling import SamplingParams
from services.engine.messages import (
    Admitted,
    Advanced,
    Fetched,
    Kind,
    Landed,
    Lend,
    Refused,
    Revoked,
    Start,
    Submit,
    Token,
)
from services.gateway.workers.worker_client import OutputToken, Started
from services.transfer.fetch import PATIENCE_MAX_S, PATIENCE_MIN_S
from services.worker.config import WorkerConfig
from tests.bench.routing.gateway import Gateway, Placed
from tests.bench.routing.step_table import StepTable
from tests.bench.routing.timeline import Timeline
from tests.bench.routing.traces import Request
from tests.bench.routing.worker import Event, Worker

NETWORK_S = 0.001
_STARTED = Started(cached_tokens=0, queue_ms=0.0, transferred_bytes=0, transfer_ms=0.0, exposed_ms=0.0)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What lives share."""

    timeline: Timeline
    workers: dict[str, Worker]
    table: StepTable
    block_size: int
    rng: random.Random
    on_end: Callable[["Life"], None]


class Life:
    def __init__(self, number: int, request: Request, gateway: Gateway, around: Surroundings) -> None:
        self.number, self.request = number, request
        self.first_token_s = self.end_s = 0.0
        self.attempts = 0
        self.cached_tokens = self.fetched_tokens = 0  # of the prompt, on the worker that computed it
        self.computed_on = ""
        self.alone = False
        self.expected_ttft_ms = 0.0
        self._gateway, self._around = gateway, around
        self._prompt_ids = request.prompt_ids(around.block_size)
        self._output_ids: list[int] = []
        self._placed: Placed | None = None

    def begin(self) -> None:
        """Try to place it, unless others wait for room already."""
        if self._gateway.has_line:
            self._gateway.wait(self.number, self._try)
        else:
            self._try()

    def _try(self) -> None:
        self.attempts += 1
        known = self._prompt_ids + self._output_ids
        left = self.request.answer_tokens - len(self._output_ids)
        self._placed = self._gateway.place(self._seq_id, known, left)
        if self._placed is None:
            self._gateway.wait(self.number, self._try)
            return
        route = self._placed.route
        attempt = _Attempt(self, self._placed, self._submit, self._around)
        if not self._output_ids:
            self.alone = route.prefill is None
            self.computed_on = route.computes.worker.id
            self.expected_ttft_ms = route.expected_ttft_ms
        self._around.timeline.after(NETWORK_S, attempt.begin)

    def admitted(self, cached_tokens: int) -> None:
        if not self._output_ids:
            self.cached_tokens, self.fetched_tokens = min(cached_tokens, self.request.prompt_tokens), 0

    def fetched(self, tokens: int) -> None:
        if not self._output_ids:
            self.fetched_tokens = tokens

    def token(self, token: Token) -> None:
        """A token reached the gateway; duplicates of a resumed attempt do not exist, since it carries all."""
        assert self._placed is not None
        self._placed.token(OutputToken(token.index, token.token))
        self._output_ids.append(token.token)
        if len(self._output_ids) == 1:
            self.first_token_s = self._around.timeline.now()
        if token.finish:
            self.end_s = self._around.timeline.now()
            self._leave()
            self._around.on_end(self)

    def started(self) -> None:
        """The decode worker has the KV."""
        assert self._placed is not None
        self._placed.expected.see(_STARTED)

    def failed(self) -> None:
        """The attempt found no room, or lost it."""
        self._leave()
        self._gateway.wait(self.number, self._try)

    def _leave(self) -> None:
        assert self._placed is not None
        self._placed.in_flight.close()

    @property
    def _seq_id(self) -> str:
        return f"{self.number}.{self.attempts}"

    def _submit(self, kind: Kind, fetch_tokens: int) -> Submit:
        return Submit(
            seq_id=self._seq_id,
            kind=kind,
            prompt_ids=self._prompt_ids,
            output_ids=list(self._output_ids),
            sampling=SamplingParams(max_tokens=self.request.answer_tokens, temperature=0.0),
            fetch_tokens=fetch_tokens,
        )


class _Attempt:
    """One try on the chosen workers."""

    def __init__(
        self, life: Life, placed: Placed, submit: Callable[[Kind, int], Submit], around: Surroundings
    ) -> None:
        route = placed.route
        self._life, self._around, self._submit = life, around, submit
        self._timeline = around.timeline
        self._prefill = around.workers[route.prefill] if route.prefill else None
        self._decode = around.workers[route.decode] if route.decode else None
        computes = route.computes
        self._source = around.workers[computes.fetch.source] if computes.fetch else None
        self._fetch_tokens = computes.ready_tokens if computes.fetch else 0
        self._seq_id = ""
        self._known = 0
        self._sent = 0  # leading tokens whose KV D has, or that are on their way
        self._landed_s = 0.0
        self._over = False

    def begin(self) -> None:
        kind: Kind = "receive" if self._prefill else "local"
        submit = self._submit(kind, 0 if self._prefill else self._fetch_tokens)
        self._seq_id = submit.seq_id
        self._known = len(submit.prompt_ids) + len(submit.output_ids)
        if self._decode:
            self._decode.submit(submit, self._heard_decode)
        else:
            self._begin_prefill()

    # The decode worker

    def _heard_decode(self, event: Event) -> None:
        match event:
            case Admitted() if self._prefill:
                self._sent = event.cached_tokens
                self._timeline.after(NETWORK_S, self._begin_prefill)
            case Admitted():
                assert self._decode is not None
                self._computing(self._decode, event)
            case Token():
                self._timeline.after(NETWORK_S, self._token, event)
            case Refused() | Revoked():
                self._fail()

    def _token(self, token: Token) -> None:
        if not self._over:
            self._over = token.finish is not None
            self._life.token(token)

    def _fail(self) -> None:
        """Give everything back and try again."""
        if not self._over:
            self._over = True
            for worker in (self._prefill, self._decode):
                if worker:
                    worker.drop(self._seq_id)
            self._timeline.after(NETWORK_S, self._life.failed)

    # The prefill worker

    def _begin_prefill(self) -> None:
        assert self._prefill is not None
        if not self._over:
            self._prefill.submit(self._submit("prefill", self._fetch_tokens), self._heard_prefill)

    def _heard_prefill(self, event: Event) -> None:
        assert self._prefill is not None
        match event:
            case Admitted():
                self._computing(self._prefill, event)
                self._stream(event.cached_tokens)
            case Advanced():
                self._stream(event.computed)
            case Token():
                self._timeline.after(NETWORK_S, self._token, event)
                self._timeline.at(self._landed_s, self._confirm, event)
            case Refused() | Revoked():
                self._fail()

    def _stream(self, computed: int) -> None:
        """KV leaves P as soon as it is there; D lacks what comes after its own cached prefix."""
        assert self._prefill is not None
        if computed > self._sent and self._decode:
            tokens, self._sent = computed - self._sent, computed
            self._landed_s = self._prefill.carry(
                tokens, self._timeline.now() + NETWORK_S, self._around.table.transfer_ms_per_token
            )

    def _confirm(self, first: Token) -> None:
        """All KV has landed: the lease is released, which takes there and back, and D starts."""
        self._timeline.after(2 * NETWORK_S, self._start, first)

    def _start(self, first: Token) -> None:
        assert self._prefill is not None
        if self._over and first.finish is None:
            return
        self._prefill.drop(self._seq_id)
        if not self._decode:
            return
        if first.finish:
            self._decode.drop(self._seq_id)
            return
        self._life.started()
        self._decode.send(Landed(self._seq_id, self._known, self._known))
        self._decode.send(Start(self._seq_id, {0: first.token}))

    # Whoever computes the prompt

    def _computing(self, worker: Worker, admitted: Admitted) -> None:
        self._life.admitted(admitted.cached_tokens)
        if admitted.fetch_tokens:
            assert self._source is not None
            _Fetch(self, worker, self._source, admitted, self._around).begin()

    @property
    def seq_id(self) -> str:
        return self._seq_id

    @property
    def over(self) -> bool:
        return self._over

    def fetched(self, tokens: int) -> None:
        self._life.fetched(tokens)

    def wanted(self, tokens: int) -> list[int]:
        submit = self._submit("prefill", 0)
        return (submit.prompt_ids + submit.output_ids)[:tokens]


class _Fetch:
    """A cached prefix on its way from another worker, as in services/transfer/fetch.py."""

    def __init__(
        self, attempt: _Attempt, worker: Worker, source: Worker, admitted: Admitted, around: Surroundings
    ) -> None:
        self._attempt, self._worker, self._source, self._around = attempt, worker, source, around
        self._timeline = around.timeline
        self._held, self._wanted = admitted.cached_tokens, admitted.fetch_tokens
        self._lending_id = f"{attempt.seq_id}/prefix"
        self._begun_s = self._ends_s = 0.0
        self._lent = 0
        self._over = False

    def begin(self) -> None:
        self._timeline.after(self._patience_s, self._give_up)
        self._timeline.after(self._around.table.transfer_ms / 1e3, self._lend)

    def _lend(self) -> None:
        lend = Lend(self._lending_id, self._attempt.wanted(self._wanted), "")
        self._source.submit(lend, self._heard)

    def _heard(self, event: Event) -> None:
        if self._over or not isinstance(event, Admitted) or event.cached_tokens <= self._held:
            if isinstance(event, Admitted):
                self._source.drop(self._lending_id)
            self._end(0)
            return
        self._lent = event.cached_tokens - self._held
        self._begun_s = max(self._timeline.now(), self._source.link_free_s)
        self._ends_s = self._source.carry(
            self._lent, self._timeline.now(), self._around.table.transfer_ms_per_token
        )
        self._source.work.lent += 1
        self._source.work.lent_tokens += self._lent
        self._timeline.at(self._ends_s, self._arrived)

    def _arrived(self) -> None:
        self._source.drop(self._lending_id)
        self._end(self._lent)

    def _give_up(self) -> None:
        """What has landed by now is proven and stays: whole blocks of it."""
        if not self._over:
            share = (self._timeline.now() - self._begun_s) / max(self._ends_s - self._begun_s, 1e-9)
            landed = int(self._lent * min(max(share, 0.0), 1.0)) if self._lent else 0
            self._end(landed // self._around.block_size * self._around.block_size)

    def _end(self, tokens: int) -> None:
        """Once: tell the engine what is there; it computes the rest."""
        if self._over:
            return
        self._over = True
        if self._attempt.over:
            return
        if tokens:
            self._worker.send(Landed(self._attempt.seq_id, self._held + tokens, self._held + tokens))
        self._worker.send(Fetched(self._attempt.seq_id))
        self._attempt.fetched(tokens)

    @property
    def _patience_s(self) -> float:
        """As long as computing would take, within bounds."""
        lacking = self._wanted - self._held
        chunk = WorkerConfig().chunk_tokens_max
        ms_per_token = self._around.table.prefill.at(chunk, self._held + lacking / 2) / chunk
        return min(max(lacking * ms_per_token / 1e3, PATIENCE_MIN_S), PATIENCE_MAX_S)
