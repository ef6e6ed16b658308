"""A gateway, composed: everything one process shares between its requests."""

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from router.state import RouteOptions
from services.core.clock import Clock
from services.core.errors import NoWorker
from services.gateway.admission.admission import Admission, AdmissionLimits
from services.gateway.admission.fair_queue import Priority
from services.gateway.admission.place_queue import PlaceQueue, WaitLimits
from services.gateway.admission.places import PlaceLimits, Places
from services.gateway.admission.ticket import Ticket
from services.gateway.api.explanation import answer as route_answer
from services.gateway.api.responses import RouteAnswer
from services.gateway.api.schema import GenerationRequest
from services.gateway.cluster.cluster_view import ClusterView
from services.gateway.config import GatewayConfig
from services.gateway.door.door import Door, LockedDoor, Locks
from services.gateway.door.tenant import Tenant
from services.gateway.metrics import GatewayMetrics
from services.gateway.path.answers import Answers, Part
from services.gateway.path.attempts import Attempts, Patience, RetryPolicy
from services.gateway.path.choices import Choices
from services.gateway.path.generation import Generation
from services.gateway.path.journal import Journal
from services.gateway.path.pipeline import Pipeline
from services.gateway.path.record import Record
from services.gateway.served_model import ServedModel
from services.gateway.text.answer import AnswerText, NoAnswer, ScoredText, TextDelta, TokenText, answer
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.grammars import Grammars, LocalTrial
from services.gateway.text.prompt import PromptReader
from services.gateway.text.shown_prompt import ShownPrompt
from services.gateway.text.stop import StopMatcher
from services.gateway.text.tool_calls.call_stream import with_calls
from services.gateway.workers.worker_client import WorkerClient
from services.history.protocol import History
from services.index.protocol import PrefixIndex
from services.membership.protocol import Membership


class Gateway:
    def __init__(
        self,
        config: GatewayConfig,
        model: ServedModel,
        membership: Membership,
        index: PrefixIndex,
        workers: WorkerClient,
        history: History,
        clock: Clock,
        locks: Locks | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.config, self.model, self.clock = config, model, clock
        self.history = history
        self.metrics = GatewayMetrics()
        self.door = Door() if locks is None else LockedDoor(*locks, self.metrics, clock)
        self.view = ClusterView(membership, index, workers, clock, model.name)
        self.draining = False
        self._rng = random.Random(config.seed or None)
        self.grammars = grammars or Grammars(LocalTrial(model.tokenizer))
        self.prompts = PromptReader(
            model,
            lambda: self.view.context_tokens_max(model.context_tokens_max),
            config.choices_max,
            self._rng,
            config.cache_sharing,
            config.answers_max,
            config.strict,
            self.grammars,
        )
        options = RouteOptions(policy=config.policy, split=config.route_split, fetch=config.prefix_fetch)
        places = Places(self.view, options, _place_limits(config), clock, self._rng)
        self.queue = PlaceQueue(places, self.view, _wait_limits(config), self.metrics, clock)
        self.admission = Admission(
            _admission_limits(config), self.queue, places, self.view, self.metrics, clock
        )
        self._pipeline = Pipeline(self.queue, self.view, workers, clock)
        self._retry_policy = RetryPolicy(config.attempts_max, config.attempts_total_max)
        self.metrics.ready.set_function(lambda: self.ready)
        self.view.on_refresh = self.queue.wake
        for priority in Priority:
            length, tokens = partial(self.queue.length, priority), partial(self.queue.tokens, priority)
            self.metrics.queue_length.labels(priority.label).set_function(length)
            self.metrics.queue_tokens.labels(priority.label).set_function(tokens)

    @property
    def ready(self) -> bool:
        """Whether new requests should come here."""
        return self.view.ready and self.door.ready and not self.draining

    def answering(
        self, generations: Sequence[Generation], record: Record
    ) -> AbstractAsyncContextManager[AsyncGenerator[list[TextDelta], None]]:
        """The way of one request, layer around layer. Raises Overloaded before any work is done for it."""
        journals = record.of_prompts(len(generations))
        parts = [self._part(*own) for own in zip(generations, journals, strict=True)]
        for part in parts[1:]:  # the request's first token is that of its first prompt
            part.ticket.first_token_by = part.ticket.deadline
        return Answers(parts, self.admission, self.queue, self.clock).streaming()

    def _part(self, generation: Generation, journal: Journal) -> Part:
        patience, choices = Patience(self._retry_policy, self.clock), Choices(generation.choices)
        first = self._ticket(generation, choices, patience, journal.received_at)

        def deltas() -> AsyncGenerator[list[TextDelta], None]:
            attempts = Attempts(generation, choices, first, self._pipeline, self.view)
            texts = [self._text(generation) for _ in range(generation.choices)]
            prompt = ShownPrompt(generation) if generation.shows_prompt else None
            events = attempts.events(patience)
            bursts = answer(prompt.heard(events) if prompt else events, texts, choices, journal)
            if generation.tools is not None:
                bursts = with_calls(bursts, generation.tools, generation.choices)
            return prompt.opening(bursts) if prompt else bursts

        return Part(generation, first, journal, deltas)

    def _ticket(
        self, generation: Generation, choices: Choices, patience: Patience, received_at: float
    ) -> Ticket:
        return Ticket(
            sequence=generation.sequence(1, tuple(range(generation.choices)), []),
            choices=choices,
            tenant=generation.tenant,
            priority=generation.priority,
            since=patience.waiting_since,
            deadline=generation.deadline,
            first_token_by=received_at + (generation.ttft_max_s or self.config.ttft_max_s),
            avoided=patience.excluded,
        )

    async def explain(self, request: GenerationRequest, tenant: Tenant) -> RouteAnswer:
        """Where the request would go if it came now. Nothing is computed for it, but it takes a slot of a
        request while its prompt is read: tokenising is work."""
        with self.admission.slot():
            generation = await self.prompts.read_one(request, "explain", self.clock.now(), tenant)
            choices, patience = Choices(generation.choices), Patience(self._retry_policy, self.clock)
            ticket = self._ticket(generation, choices, patience, self.clock.now())
            await self.queue.locate(ticket)
            route = self.admission.estimate(ticket)
        if route is None:
            raise NoWorker("No worker could take the request now.")
        wait_ms = self.queue.wait_s(ticket) * 1e3
        return route_answer(self.model.name, ticket, route, wait_ms, self.view.reports, self.view.unpaired)

    def _text(self, generation: Generation) -> TokenText:
        if not generation.wants_answer:
            return NoAnswer()
        detokenizer = Detokenizer(
            self.model.token_bytes,
            skip_special_tokens=generation.skip_special_tokens,
            kept=generation.kept_tokens,
        )
        stops = StopMatcher(generation.stop, include=generation.shows_stop)
        sampling = generation.sampling
        min_tokens = sampling.min_tokens
        ends = frozenset(sampling.end_token_ids) if sampling.grammar else None
        if sampling.top_logprobs is None:
            return AnswerText(detokenizer, stops, min_tokens, shows_end=generation.shows_stop, ends=ends)
        return ScoredText(
            detokenizer,
            stops,
            min_tokens,
            shows_end=generation.shows_stop,
            ends=ends,
            begin=len(generation.echo or ""),
        )


def _place_limits(config: GatewayConfig) -> PlaceLimits:
    return PlaceLimits(config.worker_queue_ms_max, config.decode_share)


def _wait_limits(config: GatewayConfig) -> WaitLimits:
    return WaitLimits(config.admission_timeout_s, config.no_worker_timeout_s)


def _admission_limits(config: GatewayConfig) -> AdmissionLimits:
    return AdmissionLimits(
        requests_max=config.inflight_max,
        length_max=config.queue_length_max,
        tokens_max=config.queue_tokens_max,
        tenant_share=config.queue_tenant_share,
        decode_pools_max=config.queue_decode_pools_max,
    )
