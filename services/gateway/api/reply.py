"""What an exchange answers with: how a request becomes prompts, and its deltas a body or a stream."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from router.state import Route
from services.gateway.api.formats import AnswerBody, AnswerFormat, ChatFormat, CompletionFormat, as_json
from services.gateway.api.logprobs import (
    ChatLogprobsWriter,
    CompletionLogprobsWriter,
    LogprobsWriter,
    logprobs_in,
    off_loop,
)
from services.gateway.api.responses import ErrorBody, Timings
from services.gateway.api.schema import ChatCompletionRequest, CompletionRequest, GenerationRequest
from services.gateway.api.sse import EventStream
from services.gateway.api.text_chunks import TextChunks, is_only_text
from services.gateway.door.tenant import Tenant
from services.gateway.path.generation import Generation
from services.gateway.path.record import Record
from services.gateway.text.answer import TextDelta, by_choice, joined
from services.gateway.text.detokenizer import TokenBytes
from services.gateway.text.prompt import PromptReader

Deltas = AsyncGenerator[list[TextDelta], None]  # in bursts


class Reply(Protocol):
    """One request's. `record` fills while the deltas come."""

    record: Record
    streamed: bool

    async def read(self, request_id: str, deadline: float, tenant: Tenant) -> list[Generation]:
        """Raises BadRequest, or what else is wrong before any work is done."""
        ...

    async def whole(self, deltas: Deltas) -> str:
        """The body, as JSON."""
        ...

    async def stream(self, deltas: Deltas, events: EventStream) -> None:
        """All of the stream, up to the event that tells clients that the answer is whole."""
        ...

    async def break_off(self, error: ErrorBody, events: EventStream) -> None:
        """The last event of a stream that fails."""
        ...


class ChoicesReply:
    """In the formats that have choices: chat and completions."""

    def __init__(
        self, body: GenerationRequest, prompts: PromptReader, record: Record, request_id: str
    ) -> None:
        self._body, self._prompts, self.record = body, prompts, record
        self.streamed = body.stream is True
        form = ChatFormat if isinstance(body, ChatCompletionRequest) else CompletionFormat
        self._format: AnswerFormat = form(request_id, prompts.model.name)
        self._logprobs = logprobs_writer(body, prompts.model.token_bytes)
        self._texts = TextChunks(lambda delta: as_json(self._format.chunk(delta)))
        self._wants_text_alone = self._logprobs is None and not body.return_token_ids

    async def read(self, request_id: str, deadline: float, tenant: Tenant) -> list[Generation]:
        return await self._prompts.read(self._body, request_id, deadline, tenant)

    async def whole(self, deltas: Deltas) -> str:
        collected: defaultdict[int, list[TextDelta]] = defaultdict(list)
        async for burst in deltas:
            for delta in burst:
                collected[delta.choice].append(delta)
        answers = [joined(collected[choice]) for choice in sorted(collected)]
        body = self._format.whole(answers, self.record.usage)
        return await self._json(answers, body, self._timings, self._routes)

    async def stream(self, deltas: Deltas, events: EventStream) -> None:
        opened: set[int] = set()
        unfinished = self._body.answers
        async for burst in deltas:
            chunks: list[str] = []
            for delta in by_choice(burst):
                if delta.choice not in opened:
                    opened.add(delta.choice)
                    if opening := self._format.opening(delta.choice):
                        chunks.append(as_json(opening))
                if self._wants_text_alone and is_only_text(delta):
                    chunks.append(self._texts.json(delta))
                    continue
                unfinished -= delta.finish is not None
                last = not unfinished and not self._body.include_usage
                extras = (self._timings, self._routes) if last else (None, None)
                chunks.append(await self._json([delta], self._format.chunk(delta), *extras))
            await events.event(*chunks)
        if self._body.include_usage:
            usage = self._format.usage_chunk(self.record.usage)
            await events.event(as_json(usage, None, self._timings, self._routes))
        await events.done()

    async def break_off(self, error: ErrorBody, events: EventStream) -> None:
        """No [DONE] follows."""
        await events.event(error.model_dump_json())

    async def _json(
        self,
        deltas: Sequence[TextDelta],
        body: AnswerBody,
        timings: Timings | list[Timings] | None,
        routes: list[Route] | None,
    ) -> str:
        """The body that was made of these deltas, one of each choice, with what else the client asked for."""
        token_ids = [delta.token_ids for delta in deltas] if self._body.return_token_ids else None
        if self._logprobs is None:
            return as_json(body, token_ids, timings, routes)
        choices, more = await self._logprobs.of_choices(deltas), await self._logprobs.of_body(deltas)
        count = sum(map(logprobs_in, [*choices, more])) // 20  # text is copied faster than it is made
        return await off_loop(count, lambda: as_json(body, token_ids, timings, routes, choices, more))

    @property
    def _timings(self) -> Timings | list[Timings] | None:
        return self.record.timings if self._body.timings else None

    @property
    def _routes(self) -> list[Route] | None:
        return self.record.routes if self._body.explain else None


def logprobs_writer(body: GenerationRequest, token_bytes: TokenBytes) -> LogprobsWriter | None:
    """None: it asks for none."""
    top, prompt_top = body.top_logprobs_wanted, body.prompt_logprobs
    if top is None and prompt_top is None:
        return None
    if isinstance(body, CompletionRequest):
        return CompletionLogprobsWriter(token_bytes, top, prompt_top, echoes=body.echoes)
    return ChatLogprobsWriter(token_bytes, top, prompt_top)
