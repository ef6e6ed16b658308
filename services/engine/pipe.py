"""Messages over a stream socket between the I/O process and the engine: 4 bytes of length, then the body.

The engine's side never blocks on sending: what the socket does not take at once is kept and sent in
later turns. If the other side stops reading altogether the backlog passes its bound and the engine
crashes, which is the right end: nobody is listening to it.
"""

import select
import socket

LENGTH_BYTES = 4
_BACKLOG_BYTES_MAX = 256 << 20
_READ_BYTES = 1 << 20


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


class Unframer:
    """Messages out of the bytes of a stream, which come in any pieces."""

    def __init__(self) -> None:
        self._incoming = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes."""
        self._incoming += data
        messages: list[bytes] = []
        start = 0
        while len(self._incoming) - start >= LENGTH_BYTES:
            body = start + LENGTH_BYTES
            end = body + int.from_bytes(self._incoming[start:body], "little")
            if len(self._incoming) < end:
                break
            messages.append(bytes(self._incoming[body:end]))
            start = end
        del self._incoming[:start]
        return messages


class EnginePipe:
    """The engine's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._unframer = Unframer()
        self._outgoing = bytearray()

    def send(self, body: bytes) -> None:
        self._outgoing += frame(body)
        assert len(self._outgoing) < _BACKLOG_BYTES_MAX, "the I/O process has stopped reading"
        self._send_some()

    def flush(self) -> None:
        """Block until everything is sent."""
        while self._outgoing:
            select.select([], [self._socket], [])
            self._send_some()

    def receive_one(self) -> bytes:
        """Block for the next message. Raises EOFError when the other side is gone."""
        while not (messages := self.receive(wait=True)):
            if messages is None:
                raise EOFError
        assert len(messages) == 1, "more than one message during setup"
        return messages[0]

    def receive(self, *, wait: bool, wait_s: float | None = None) -> list[bytes] | None:
        """All complete messages; `wait` blocks for some, or for about `wait_s`. None: the other side has
        closed."""
        self._send_some()
        while True:
            messages = self._read(wait=wait, wait_s=wait_s)
            if messages is None or messages or not wait or wait_s is not None:
                return messages

    def _read(self, *, wait: bool, wait_s: float | None) -> list[bytes] | None:
        """The messages that what is there completes. None: closed."""
        if wait:
            writable = [self._socket] if self._outgoing else []
            readable, writable, _ = select.select([self._socket], writable, [], wait_s)
            if writable:
                self._send_some()
            if not readable:
                return []
        messages: list[bytes] = []
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return messages
            except ConnectionError:
                return None
            if not data:
                return None
            messages += self._unframer.feed(data)

    def _send_some(self) -> None:
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except BlockingIOError:
                return
            except ConnectionError:
                self._outgoing.clear()  # the next receive reports the closed connection
                return
            del self._outgoing[:sent]
