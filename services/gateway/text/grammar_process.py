"""The child process that tries grammars: frames on stdin, one reply for each on stdout.

A grammar may be made to take for ever, to fill the memory or to overflow the stack of whoever compiles it. So
each is tried in a fork of this process, which has the tokenizer and nothing else: the kernel ends a fork that
takes more processor time than it may, and whatever happens to it happens to that grammar alone.

The first frame is a GrammarVocabulary; the others are Asked, each answered by a Reply.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from services.core.errors import BadRequest, ModelFileError
from services.gateway.text.frames import read_frame, write_frame
from services.gateway.text.grammar import Asked, grammar_text
from services.model.grammar import STACK_BYTES, GrammarVocabulary, compile_grammar, reason

# The longest schemas that are allowed take a tenth of it.
PROCESSOR_S = 0.5
_MEMORY_BYTES = 1 << 30  # beside what this process has
_TOKENS_TRIED = 3
_MESSAGE_CHARACTERS_MAX = 500


class Reply(msgspec.Struct, frozen=True):
    grammar: str = ""
    error: str = ""  # if it is not empty, there is no grammar


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the gateway too, which still has requests
    reader, writer = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer = msgspec.msgpack.decode(read_frame(reader), type=GrammarVocabulary).load()
    except ModelFileError as error:
        unusable = msgspec.msgpack.encode(Reply(error=error.message))
        answer: Callable[[bytes], bytes] = lambda body: unusable  # noqa: E731
    else:
        answer = lambda body: _in_fork(tokenizer, body)  # noqa: E731
    while body := read_frame(reader):
        write_frame(writer, answer(body))


def tried(tokenizer: LLTokenizer, asked: Asked) -> Reply:
    """Needs a thread with STACK_BYTES."""
    try:
        grammar = grammar_text(asked)
        follow(compile_grammar(tokenizer, grammar))
    except (BadRequest, ValueError) as error:
        return Reply(error=str(error)[:_MESSAGE_CHARACTERS_MAX])
    except RecursionError:
        return Reply(error="it is nested too deeply")
    except MemoryError:
        return Reply(error="it needs too much memory")
    return Reply(grammar)


def follow(matcher: LLMatcher) -> None:
    """Some tokens of an answer. Raises BadRequest if the grammar has no answer or is too complex."""
    for _ in range(_TOKENS_TRIED):
        words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(words, bitorder="little"))
        if matcher.is_stopped() and not matcher.is_error():
            return
        if not len(allowed) or matcher.is_error():
            raise BadRequest(reason(matcher))
        matcher.consume_token(int(allowed[-1]))


def in_large_thread(work: Callable[[], None]) -> None:
    """Run `work` in a thread whose stack is large enough for any grammar."""
    usual = threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    threading.stack_size(usual)
    thread.join()


def _in_fork(tokenizer: LLTokenizer, body: bytes) -> bytes:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        _try_and_exit(tokenizer, body, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reply = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return reply
    overran = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
    error = "it is too complex: it takes too long to compile" if overran else "it is too complex"
    return msgspec.msgpack.encode(Reply(error=error))


def _try_and_exit(tokenizer: LLTokenizer, body: bytes, pipe: int) -> None:
    status = 1
    try:
        _limit()

        def work() -> None:
            nonlocal status
            asked = msgspec.msgpack.decode(body, type=Asked)
            with os.fdopen(pipe, "wb") as writer:
                writer.write(msgspec.msgpack.encode(tried(tokenizer, asked)))
            status = 0

        in_large_thread(work)
    finally:
        os._exit(status)


def _limit() -> None:
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = here + STACK_BYTES + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_S)


if __name__ == "__main__":
    main()
