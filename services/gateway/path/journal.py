"""What happened to one prompt of a request: its stages, times and counts. Usage, timings and metrics come
from it; `record` sums them up for the request."""

from collections import deque

from router.state import Route
from services.core.clock import Clock
from services.core.errors import facts
from services.core.stages import ENDS, Stage, Timeline
from services.gateway.api.responses import PromptTokensDetails, Timings, Usage
from services.gateway.metrics import GatewayMetrics
from services.gateway.path.generation import AttemptFailed, Event, Routed
from services.gateway.workers.worker_client import OutputToken, PrefillResult, Started

# As many as attempts may fail; those that found no room are forgotten, however long a request waits.
ROUTES_KEPT = 16


class Journal:
    """With several attempts at once, each for choices of its own, the stage and the workers are those
    of the latest news."""

    def __init__(
        self, clock: Clock, metrics: GatewayMetrics, received_at: float, *, keeps_routes: bool = False
    ) -> None:
        self._clock, self._metrics = clock, metrics
        self._timeline = Timeline(clock, metrics.leave_stage, started_at=received_at)
        self._prompt_tokens = self._seed = 0
        self._completion_tokens = 0
        self._wants_answer = True
        self._cached_tokens: int | None = None  # of the prompt: not computed when it first was
        self._attempts = 0
        self._routes: deque[Route] = deque(maxlen=ROUTES_KEPT if keeps_routes else 0)
        self._routed: Routed | None = None
        self._prefill: PrefillResult | None = None  # these two of the latest attempt
        self._started: Started | None = None
        self._first_token_at = received_at
        self._last_token_at: dict[int, float] = {}  # by choice

    @property
    def received_at(self) -> float:
        return self._timeline.started_at

    def admit(self, prompt_tokens: int, seed: int, *, wants_answer: bool = True) -> None:
        """The prompt is understood, and there is room for it in the gateway. Without an answer the token
        that workers give all the same is not counted."""
        self._prompt_tokens, self._seed, self._wants_answer = prompt_tokens, seed, wants_answer
        self._timeline.enter(Stage.ADMITTED)

    def record(self, event: Event) -> None:
        match event:
            case OutputToken():  # the most frequent first
                self._record_token(event)
            case Routed():
                self._record_route(event)
            case PrefillResult():
                self._prefill = event
                self._note_cached(event.cached_tokens + event.fetched_tokens)
            case Started():
                self._started = event
                if self._timeline.stage is Stage.TRANSFERRING:
                    self._timeline.enter(Stage.DECODING)
            case AttemptFailed():
                self._record_failure(event)

    def _record_route(self, routed: Routed) -> None:
        self._attempts += 1
        self._routes.append(routed.route)
        self._routed, self._prefill, self._started = routed, None, None
        self._metrics.routes.labels(routed.kind).inc()
        if self._timeline.stage is Stage.ADMITTED:  # else another attempt is further
            self._timeline.enter(Stage.ROUTED)
            self._timeline.enter(Stage.PREFILLING)

    def _record_failure(self, failed: AttemptFailed) -> None:
        self._metrics.retries.labels(facts(failed.error).label).inc()
        # It may not even have been routed.
        if self._timeline.stage is not Stage.ADMITTED and not failed.others_go_on:
            self._timeline.enter(Stage.ADMITTED)

    def _record_token(self, token: OutputToken) -> None:
        now = self._clock.now()
        if self._completion_tokens == 0:
            self._record_first_token(now)
        if token.choice in self._last_token_at:
            self._metrics.tokens.note_gap(now - self._last_token_at[token.choice])
        self._completion_tokens += 1
        if self._wants_answer:
            self._metrics.tokens.count()
        self._last_token_at[token.choice] = now
        if self._timeline.stage is Stage.PREFILLING and token.finish is None:
            transferred = self._started is not None
            self._timeline.enter(Stage.DECODING if transferred else Stage.TRANSFERRING)

    def _record_first_token(self, now: float) -> None:
        self._first_token_at = now
        self._metrics.time_to_first_token.observe(now - self._timeline.started_at)
        self._metrics.prompt_tokens.inc(self._prompt_tokens)
        if self._routed is not None and self._routed.prefill is None and self._started is not None:
            self._note_cached(self._started.cached_tokens + self._started.fetched_tokens)
        self._metrics.cached_tokens.inc(self._cached_tokens or 0)

    def _note_cached(self, tokens: int) -> None:
        """A resume computes delivered tokens too, so only the first computation says what was cached."""
        if self._cached_tokens is None:
            self._cached_tokens = min(tokens, self._prompt_tokens)

    def end(self, stage: Stage) -> None:
        """Enter the last stage, unless it has ended already."""
        if self._timeline.stage not in ENDS:
            self._timeline.enter(stage)

    @property
    def completion_tokens(self) -> int:
        """Of all choices, so far."""
        return self._completion_tokens

    @property
    def usage(self) -> Usage:
        completion_tokens = self._completion_tokens if self._wants_answer else 0
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens or 0),
        )

    @property
    def routes(self) -> list[Route]:
        """Of the last attempts, if they are to be kept."""
        return list(self._routes)

    @property
    def timings(self) -> Timings:
        """So far; exact once the last token was recorded. Parts that did not happen are 0."""
        prefill, started, routed = self._prefill, self._started, self._routed
        computing = prefill or started  # where the prompt waited to be computed
        visits = self._timeline.seconds_in
        decode_s = max(self._last_token_at.values(), default=self._first_token_at) - self._first_token_at
        decoded = self._completion_tokens - len(self._last_token_at)  # all but the first of each choice
        return Timings(
            tokenize=_ms(visits(Stage.RECEIVED)),
            route=_ms(visits(Stage.ADMITTED) + visits(Stage.ROUTED)),
            queue=round(computing.queue_ms, 3) if computing else 0.0,
            prefill=round(prefill.compute_ms, 3) if prefill else _ms(visits(Stage.PREFILLING)),
            fetch=round(computing.fetch_ms, 3) if computing else 0.0,
            transfer=round(started.transfer_ms, 3) if started else 0.0,
            exposed_transfer=round(started.exposed_ms, 3) if started else 0.0,
            first_token=_ms(self._first_token_at - self._timeline.started_at),
            decode=_ms(decode_s),
            total=_ms(self._clock.now() - self._timeline.started_at),
            tokens_per_second=round(decoded / decode_s, 2) if decode_s > 0 else 0.0,
            prefill_worker=routed.prefill.worker_id if routed and routed.prefill else None,
            decode_worker=routed.decode.worker_id if routed and routed.decode else None,
            cached_tokens_prefill=prefill.cached_tokens if prefill else 0,
            cached_tokens_decode=started.cached_tokens if started else 0,
            fetched_tokens=computing.fetched_tokens if computing else 0,
            attempts=self._attempts,
            seed=self._seed,
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
