"""A gateway, composed: everything one process shares between its requests."""

import random
from collections.abc import AsyncGenerator

from router.state import RouteOptions
from services.core.clock import Clock
from services.core.errors import NoWorker
from services.gateway.admission import Admission
from services.gateway.answer import AnswerText, TextDelta, answer
from services.gateway.attempts import Attempts, Patience, RetryPolicy
from services.gateway.choices import Choices
from services.gateway.cluster_view import ClusterView
from services.gateway.config import GatewayConfig
from services.gateway.detokenizer import Detokenizer
from services.gateway.explanation import answer as route_answer
from services.gateway.generation import Generation
from services.gateway.journal import Journal
from services.gateway.metrics import GatewayMetrics
from services.gateway.pipeline import Pipeline
from services.gateway.prompt import PromptReader
from services.gateway.responses import RouteAnswer
from services.gateway.schema import GenerationRequest
from services.gateway.served_model import ServedModel
from services.gateway.stop import StopMatcher
from services.gateway.tenant import Tenant
from services.gateway.waiting_line import WaitingLine
from services.gateway.worker_client import WorkerClient
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
        clock: Clock,
    ) -> None:
        self.config, self.model, self.clock = config, model, clock
        self.metrics = GatewayMetrics()
        self.admission = Admission(config.inflight_max, self.metrics)
        self.view = ClusterView(membership, index, workers, clock, model.name)
        self.draining = False
        self._rng = random.Random(config.seed or None)
        self.prompts = PromptReader(
            model,
            lambda: self.view.context_tokens_max(model.context_tokens_max),
            config.choices_max,
            self._rng,
            config.cache_sharing,
        )
        options = RouteOptions(policy=config.policy, split=config.route_split, fetch=config.prefix_fetch)
        self._pipeline = Pipeline(self.view, workers, options, clock, self._rng)
        self._line = WaitingLine(clock)
        self.metrics.ready.set_function(lambda: self.ready)
        self.metrics.waiting.set_function(lambda: len(self._line))
        self._retry_policy = RetryPolicy(
            config.attempts_max,
            config.attempts_total_max,
            config.admission_timeout_s,
            config.no_worker_timeout_s,
        )

    @property
    def ready(self) -> bool:
        """Whether new requests should come here."""
        return self.view.ready and not self.draining

    def answer(self, generation: Generation, journal: Journal) -> AsyncGenerator[TextDelta, None]:
        """The way of one request, layer around layer. To be closed by whoever stops early."""
        patience = Patience(self._retry_policy, self._line, generation.deadline, self.clock, self._rng)
        choices = Choices(generation.choices)
        attempts = Attempts(generation, choices, self._pipeline, self.view)
        texts = [self._text(generation) for _ in range(generation.choices)]
        return answer(attempts.events(patience), texts, choices, journal)

    async def explain(self, request: GenerationRequest, tenant: Tenant) -> RouteAnswer:
        """Where the request would go if it came now. It is not counted and nothing is computed for it."""
        generation = await self.prompts.read(request, "explain", self.clock.now(), tenant)
        sequence = generation.sequence(1, tuple(range(generation.choices)), [])
        located = await self.view.locate(generation.prompt_ids, generation.salt)
        route = self._pipeline.route(sequence, located)
        if route is None:
            raise NoWorker("No worker could take the request now.")
        return route_answer(self.model.name, sequence.known_tokens, route, located, self.view.reports)

    def _text(self, generation: Generation) -> AnswerText:
        return AnswerText(
            Detokenizer(self.model.token_bytes, skip_special_tokens=generation.skip_special_tokens),
            StopMatcher(generation.stop),
            generation.sampling.min_tokens,
        )
