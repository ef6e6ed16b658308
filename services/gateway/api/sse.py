"""Server-sent events: the response of a streamed answer, begun when its first event is there.

Until then nothing is sent, so a request that fails before its first token still gets a proper status.
"""

from starlette.types import Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events before it passes them on
]

# Unicode calls these ends of lines too: clients that split by str.splitlines, as httpx's iter_lines does,
# would cut an event in two.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


class EventStream:
    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def event(self, *data: str) -> None:
        """Send an event, or several together; the data of each is JSON in one line."""
        await self._send_text("".join([f"data: {one}\n\n" for one in data]))

    async def named(self, *events: tuple[str, str]) -> None:
        """The same for events that have a name before their data."""
        await self._send_text("".join([f"event: {name}\ndata: {data}\n\n" for name, data in events]))

    async def _send_text(self, body: str) -> None:
        if not body.isascii():
            body = body.translate(_LINE_ENDS)
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": body.encode(), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def done(self) -> None:
        """End in the way that tells OpenAI clients that the answer is whole."""
        await self.event("[DONE]")
        await self.end()
