"""What an answer shows of its prompt: the text before it, and the logprobs of its tokens."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from services.core.errors import EngineFailed
from services.core.logprobs import PromptLogprobs
from services.gateway.path.generation import Event, Generation, Routed
from services.gateway.text.answer import ScoredPrompt, TextDelta
from services.gateway.workers.worker_client import PrefillResult


class ShownPrompt:
    """Stands on both sides of the answer: it hears the logprobs as they come up, and opens each choice."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._parts: list[PromptLogprobs] = []

    async def heard(self, bursts: AsyncGenerator[list[Event], None]) -> AsyncGenerator[list[Event], None]:
        """The same events."""
        async with aclosing(bursts):
            async for burst in bursts:
                for event in burst:
                    self._hear(event)
                yield burst

    async def opening(
        self, bursts: AsyncGenerator[list[TextDelta], None]
    ) -> AsyncGenerator[list[TextDelta], None]:
        """The same deltas, each choice's after one of the prompt.

        Raises EngineFailed if the worker that computed the prompt did not give its logprobs.
        """
        opened: set[int] = set()
        prompt: TextDelta | None = None
        async with aclosing(bursts):
            async for burst in bursts:
                prompt = prompt or self._delta()
                new = list(dict.fromkeys(delta.choice for delta in burst if delta.choice not in opened))
                opened.update(new)
                yield [*(replace(prompt, choice=choice) for choice in new), *burst] if new else burst

    def _hear(self, event: Event) -> None:
        match event:
            case Routed() if not self._complete:  # an attempt before it may have given some
                self._parts = []
            case PrefillResult(prompt_logprobs=parts) if not self._complete:
                self._parts = list(parts)
            case PromptLogprobs() if not self._complete:
                self._parts.append(event)

    @property
    def _complete(self) -> bool:
        return (self._parts[-1].end if self._parts else 1) >= len(self._generation.prompt_ids)

    def _delta(self) -> TextDelta:
        echo = self._generation.echo
        if self._generation.sampling.prompt_logprobs is None:
            return TextDelta(echo or "")
        if not self._complete:
            raise EngineFailed("the worker gave no logprobs of the prompt")
        return TextDelta(echo or "", prompt=ScoredPrompt(self._generation.prompt_ids, echo, self._parts))
