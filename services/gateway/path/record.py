"""What happened to one request: how it ended, and the journals of its prompts.

Usage is the sum over the prompts, as OpenAI counts it. Timings are of each prompt: they compute side by side,
so nothing of them adds up.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from router.state import Route
from services.core.clock import Clock
from services.core.errors import DiptychError, RequestCancelled, facts
from services.core.stages import Stage
from services.gateway.api.responses import PromptTokensDetails, Timings, Usage
from services.gateway.metrics import GatewayMetrics
from services.gateway.path.journal import Journal


class Record:
    def __init__(
        self,
        endpoint: str,
        clock: Clock,
        metrics: GatewayMetrics,
        received_at: float,
        *,
        keeps_routes: bool = False,
    ) -> None:
        self._endpoint, self._clock, self._metrics = endpoint, clock, metrics
        self._keeps_routes = keeps_routes
        self.received_at = received_at
        self._journals = [self._journal()]  # the first is also that of a request which is never understood

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Around the whole request: enters the last stage of what is not over, and counts the outcome."""
        try:
            yield
        except DiptychError as error:
            self._end(Stage.FAILED, facts(error).label)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._end(Stage.CANCELLED, facts(RequestCancelled()).label)
            raise
        except Exception:
            self._end(Stage.FAILED, "internal")
            raise
        self._end(Stage.FINISHED, "ok")

    def of_prompts(self, count: int) -> list[Journal]:
        """A journal for each of the request's prompts."""
        self._journals += [self._journal() for _ in range(count - len(self._journals))]
        return self._journals

    def _journal(self) -> Journal:
        return Journal(self._clock, self._metrics, self.received_at, keeps_routes=self._keeps_routes)

    def _end(self, stage: Stage, outcome: str) -> None:
        for journal in self._journals:
            journal.end(stage)
        self._metrics.requests.labels(self._endpoint, outcome).inc()

    @property
    def completion_tokens(self) -> int:
        """Of all answers, so far."""
        return sum(journal.completion_tokens for journal in self._journals)

    @property
    def usage(self) -> Usage:
        each = [journal.usage for journal in self._journals]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in each),
            completion_tokens=sum(usage.completion_tokens for usage in each),
            total_tokens=sum(usage.total_tokens for usage in each),
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(usage.prompt_tokens_details.cached_tokens for usage in each)
            ),
        )

    @property
    def timings(self) -> Timings | list[Timings]:
        """A list where there are several prompts, in their order."""
        first, *others = [journal.timings for journal in self._journals]
        return [first, *others] if others else first

    @property
    def routes(self) -> list[Route]:
        """Of the last attempts at each prompt, in the prompts' order, if they are to be kept."""
        return [route for journal in self._journals for route in journal.routes]
