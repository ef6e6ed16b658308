"""The child process that renders chat templates: frames on stdin, one reply for each on stdout.

It imports no more than rendering needs. The kernel ends it when a template takes more processor time than
it may, whatever the template does; more memory than it may have is an error like any other.

The first frame is a Setup, answered by an empty one; the others are lists of pickled Chats, each answered by
a list of one Rendered or Refused for each.
"""

import pickle
import resource
import signal
import sys

import msgspec

from services.core.errors import BadRequest
from services.gateway.text.frames import read_frame, write_frame
from services.model.chat_template import Chat, ChatTemplate


class Limits(msgspec.Struct, frozen=True):
    """Of one child process."""

    seconds: float  # of processor time for one text
    memory_bytes: int = 512 << 20  # of address space; 8 MB of messages take up to a third of it


class Setup(msgspec.Struct, frozen=True):
    sources: dict[str, str]
    special_tokens: dict[str, str]
    limits: Limits


class Rendered(msgspec.Struct, frozen=True, tag=True):
    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    message: str
    param: str | None
    code: str | None


Reply = Rendered | Refused

_TOO_MUCH_MEMORY = "The chat template needs too much memory for these messages."


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the gateway too, which still has requests
    reader, writer = sys.stdin.buffer, sys.stdout.buffer
    setup = msgspec.msgpack.decode(read_frame(reader), type=Setup)
    template = ChatTemplate(setup.sources, setup.special_tokens)
    for limit, value in _resources(setup.limits).items():
        resource.setrlimit(limit, (value, value))
    write_frame(writer, b"")
    while frame := read_frame(reader):
        replies: list[Reply] = []
        for body in msgspec.msgpack.decode(frame, type=list[bytes]):
            signal.setitimer(signal.ITIMER_PROF, setup.limits.seconds)
            replies.append(_reply(template, body))
            signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(writer, _encoded(replies))


def _resources(limits: Limits) -> dict[int, int]:
    """Other systems than Linux cannot bound the address space."""
    memory = {resource.RLIMIT_AS: limits.memory_bytes} if sys.platform == "linux" else {}
    return {**memory, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}


def _reply(template: ChatTemplate, body: bytes) -> Reply:
    param = "messages"
    try:
        chat: Chat = pickle.loads(body)
        param = chat.template_param
        text = template.render(chat)
        text.encode()
        return Rendered(text)
    except BadRequest as error:
        return Refused(error.message, error.param, error.code)
    except UnicodeEncodeError:
        problem = "The chat's text holds half of a surrogate pair. Send valid Unicode."
    except MemoryError:
        problem = _TOO_MUCH_MEMORY
    return Refused(problem, param, None)


def _encoded(replies: list[Reply]) -> bytes:
    try:
        return msgspec.msgpack.encode(replies)
    except MemoryError:
        return msgspec.msgpack.encode([Refused(_TOO_MUCH_MEMORY, None, None)] * len(replies))


if __name__ == "__main__":
    main()
