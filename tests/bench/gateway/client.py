"""The load, in a process of its own: raw sockets, so that it takes a small part of a core.

    python -m tests.bench.gateway.client ORDER OUTPUT

Each connection asks one request after the other, as long as the window is open.
"""

import asyncio
import random
import sys
import time
from bisect import bisect_right
from pathlib import Path

import httptools
import msgspec
import uvloop

from tests.bench.gateway.load import Call, ClientOrder, ClientReport

WORDS = ["the", "of", "and", "a", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by"]
PROMPT_WORDS = 96
SYSTEM = "You answer in one short paragraph, without lists, and say so if you do not know something. " * 2
CONNECT_TIMEOUT_S = 10.0


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta


class Chunk(msgspec.Struct):
    """What a client needs of a streamed event."""

    id: str = ""
    choices: list[Choice] = []
    timings: dict[str, float | int | str | None] | None = None
    error: dict[str, object] | None = None


class Usage(msgspec.Struct):
    completion_tokens: int


class Whole(msgspec.Struct):
    id: str
    usage: Usage


class Answer:
    """What comes back for one request. `answer_characters`: see ClientOrder."""

    def __init__(self, call: Call, answer_characters: list[int], streamed: bool) -> None:
        self.call = call
        self._characters, self._streamed = answer_characters, streamed
        self._seen = 0  # characters
        self._rest = b""
        self._chunks = msgspec.json.Decoder(Chunk)

    def feed(self, body: bytes, now: float) -> None:
        if not self._streamed:
            self._rest += body
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if event != b"data: [DONE]":
                self._read(self._chunks.decode(event[6:]))
        # After the last character of all tokens so far, and before the first one of the next.
        tokens = bisect_right(self._characters, self._seen)
        if tokens and (not self.call.tokens or tokens > self.call.tokens[-1]):
            self.call.seen_at.append(now)
            self.call.tokens.append(tokens)

    def end(self, status: int, now: float) -> None:
        self.call.ended_at = now
        if status != 200:
            self.call.problem = f"{status}: {self._rest[:200].decode(errors='replace')}"
        elif not self._streamed:
            whole = msgspec.json.decode(self._rest, type=Whole)
            self.call.request_id = whole.id.removeprefix("chatcmpl-")
            self.call.seen_at.append(now)
            self.call.tokens.append(whole.usage.completion_tokens)

    def _read(self, chunk: Chunk) -> None:
        self.call.events += 1
        if chunk.error is not None:
            self.call.problem = str(chunk.error.get("message"))
            return
        if not self.call.request_id:
            self.call.request_id = chunk.id.removeprefix("chatcmpl-")
        for choice in chunk.choices:
            self._seen += len(choice.delta.content or "")
        if chunk.timings is not None:
            self.call.timings = chunk.timings


class Connection(asyncio.Protocol):
    """One request after the other."""

    def __init__(self, order: ClientOrder, calls: list[Call], number: int) -> None:
        self._order, self._calls = order, calls
        self._rng = random.Random(number)
        self._answer: Answer | None = None
        self._closing = False

    def connection_made(self, transport) -> None:
        self._transport = transport

    def ask(self) -> None:
        order = self._order
        self._parser = httptools.HttpResponseParser(self)
        call = Call(sent_at=time.monotonic())
        self._answer = Answer(call, order.answer_characters, order.load.streamed)
        self._calls.append(call)
        body = msgspec.json.encode(self._body())
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)

    def _body(self) -> dict[str, object]:
        load, rng = self._order.load, self._rng
        question = " ".join([str(rng.getrandbits(32)), *rng.choices(WORDS, k=PROMPT_WORDS)])
        body = {
            "model": self._order.model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            "max_tokens": answer_tokens(load.answer_tokens, rng),
            "stream": load.streamed,
        }
        return body | {"timings": True} if load.timings else body

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        assert self._answer is not None
        self._answer.feed(body, time.monotonic())

    def on_message_complete(self) -> None:
        assert self._answer is not None
        now = time.monotonic()
        self._answer.end(self._parser.get_status_code(), now)
        self._answer = None
        if now < self._order.window.ends_at:
            asyncio.get_running_loop().call_soon(self.ask)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._closing:
            self._answer.call.problem = f"the connection closed: {error}"

    def close(self) -> None:
        self._closing = True
        self._transport.abort()


def answer_tokens(mean: int, rng: random.Random) -> int:
    return rng.randint(max(1, mean // 2), mean + mean // 2)


async def run(order: ClientOrder) -> ClientReport:
    """All connections ask for the first time between the beginning and the measured part."""
    loop, window = asyncio.get_running_loop(), order.window
    calls: list[Call] = []
    connections: list[Connection] = []
    bugs: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: bugs.append(context))
    for number in range(order.load.concurrency):
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(
                lambda number=number: Connection(order, calls, number), "127.0.0.1", order.port
            )
        connections.append(connection)
    ramp_s = (window.measured_from - window.begins_at) / 2
    for number, connection in enumerate(connections):
        at = window.begins_at + ramp_s * number / len(connections)
        loop.call_later(max(0.0, at - time.monotonic()), connection.ask)
    await asyncio.sleep(window.measured_from - time.monotonic())
    cpu_s = time.process_time()
    await asyncio.sleep(window.ends_at - time.monotonic())
    cpu_s = time.process_time() - cpu_s
    for connection in connections:
        connection.close()
    await asyncio.sleep(0)
    assert not bugs, bugs[0]
    return ClientReport(calls, cpu_s / window.seconds)


if __name__ == "__main__":
    report = uvloop.run(run(msgspec.json.decode(sys.argv[1], type=ClientOrder)))
    Path(sys.argv[2]).write_bytes(msgspec.msgpack.encode(report))
