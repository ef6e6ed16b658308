"""The client of all contestants: OpenAI completions with token ids as the prompt, streamed, over raw sockets.

It takes a small part of a core, which it shares with whom it measures.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httptools
import msgspec

UNFINISHED = "not answered when the cell's time was over"
_DATA, _DONE = b"data:", b"[DONE]"


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


@dataclass
class Exchange:
    """One request. Times are those of time.perf_counter."""

    sent_at: float
    problem: str = UNFINISHED  # empty: the whole answer came
    tokens: int = 0  # of the answer, as the server counts them
    arrivals: list[float] = field(default_factory=list)  # of events with text; one may bring several tokens
    ended_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Taken:
    """What one repetition of a cell showed."""

    exchanges: Sequence[Exchange]  # also those never sent, because time was over
    seconds: float


class Reader:
    """From the bytes of an event stream to an exchange."""

    def __init__(self, exchange: Exchange, prompt_tokens: int, answer_tokens: int) -> None:
        self._exchange = exchange
        self._expected = _Usage(prompt_tokens, answer_tokens)
        self._decoder = msgspec.json.Decoder(_Chunk)
        self._rest = b""
        self._usage: _Usage | None = None
        self._done = False
        self._error = ""

    def feed(self, body: bytes, now: float) -> None:
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._read(line[len(_DATA) :].strip(), now)
            elif line.strip() and not line.startswith(b":"):
                self._error = self._error or line.decode(errors="replace")

    def end(self, status: int, now: float) -> None:
        self._exchange.ended_at = now
        self._exchange.tokens = self._usage.completion_tokens if self._usage else 0
        self._exchange.problem = self._problem(status)

    def _read(self, data: bytes, now: float) -> None:
        if data == _DONE:
            self._done = True
            return
        chunk = self._decoder.decode(data)
        if bytes(chunk.error):
            self._error = bytes(chunk.error).decode(errors="replace")
        if chunk.usage is not None:
            self._usage = chunk.usage
        if any(choice.text for choice in chunk.choices):
            self._exchange.arrivals.append(now)

    def _problem(self, status: int) -> str:
        if status != 200:
            return f"HTTP {status}: {self._error or self._rest.decode(errors='replace')}"[:200]
        if self._error:
            return f"in the stream: {self._error}"[:200]
        if not self._done or self._usage is None:
            return "the stream ended early"
        if self._usage != self._expected:
            return f"{self._usage} instead of {self._expected}"
        return "" if self._exchange.arrivals else "no text in the whole answer"


class _Asking(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes, reader: Reader) -> None:
        self._request, self._reader = request, reader
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._parser = httptools.HttpResponseParser(self)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._reader.feed(body, time.perf_counter())

    def on_message_complete(self) -> None:
        self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self._reader.end(self._parser.get_status_code(), time.perf_counter())
            self.ended.set_result(None)


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and what its requests need beside the common fields."""

    port: int
    model: str
    extra: dict[str, object] = field(default_factory=dict)

    def request(self, prompt: Sequence[int], answer_tokens: int) -> bytes:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        encoded = msgspec.json.encode(body)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(encoded)}\r\n\r\n"
        )
        return head.encode() + encoded


async def ask(target: Target, prompt: Sequence[int], answer_tokens: int, exchange: Exchange) -> None:
    """Follow one request to its end, into `exchange`; never raises for what the server does."""
    reader = Reader(exchange, len(prompt), answer_tokens)
    request = target.request(prompt, answer_tokens)
    exchange.sent_at = time.perf_counter()
    loop = asyncio.get_running_loop()
    try:
        transport, asking = await loop.create_connection(
            lambda: _Asking(request, reader), "127.0.0.1", target.port
        )
    except OSError as error:
        exchange.problem = f"no connection: {error}"
        return
    try:
        await asking.ended
    finally:
        transport.abort()


async def put_load(
    target: Target, prompts: Sequence[Sequence[int]], answer_tokens: int, concurrency: int, limit_s: float
) -> Taken:
    """All prompts, by `concurrency` clients, within `limit_s`."""
    begun_at = time.perf_counter()
    exchanges = [Exchange(begun_at) for _ in prompts]
    waiting = iter(zip(prompts, exchanges, strict=True))

    async def client() -> None:
        for prompt, exchange in waiting:
            await ask(target, prompt, answer_tokens, exchange)

    try:
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(client())
    except TimeoutError:
        pass  # what is unfinished says so
    return Taken(exchanges, time.perf_counter() - begun_at)
