"""Grammars that were tried: the only ones that workers get."""

import asyncio
import logging
import os
import signal
import sys
from collections import OrderedDict
from functools import lru_cache
from typing import Protocol

import msgspec
from llguidance import LLTokenizer

from services.core.errors import BadRequest, EngineFailed, Overloaded
from services.core.parent_death import dying_with_parent
from services.gateway.text.grammar import Asked
from services.gateway.text.grammar_process import LENGTH_BYTES, PROCESSOR_S, Reply, in_large_thread, tried
from services.model.grammar import GRAMMAR_CHARACTERS_MAX, GrammarVocabulary
from services.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_WAITING_MAX = 64
_KNOWN_CHARACTERS_MAX = 8 << 20  # of all texts that are remembered, asked and made
_WALL_S = 20 * PROCESSOR_S  # a machine may be busy; and the process starts within it
_INHERITED = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TZ")  # and no secret


class Trial(Protocol):
    async def ask(self, asked: Asked) -> Reply: ...

    async def close(self) -> None: ...


@lru_cache(2)
def _loaded(tokenizer: Tokenizer) -> LLTokenizer:
    return GrammarVocabulary.of(tokenizer).load()


class LocalTrial:
    """In this process and without limits: for tests and tools that serve nobody."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def ask(self, asked: Asked) -> Reply:
        replies: list[Reply] = []
        in_large_thread(lambda: replies.append(tried(_loaded(self._tokenizer), asked)))
        return replies[0]

    async def close(self) -> None:
        pass


class ProcessTrial:
    """In a process of its own, started when the first grammar comes. Use it in the main thread only: children
    die with the thread that started them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, asked: Asked) -> Reply:
        """Raises EngineFailed if the process does not answer, for whatever reason but the grammar."""
        try:
            async with asyncio.timeout(_WALL_S):
                process = await self._running()
                return msgspec.msgpack.decode(
                    await _exchange(process, msgspec.msgpack.encode(asked)), type=Reply
                )
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            await self.close()
            logger.error("the process that tries grammars does not answer (%r)", error)
            raise EngineFailed("The grammar could not be tried. Try again in a moment.") from None
        except BaseException:
            await self.close()  # it is in the middle of something that nobody waits for any more
            raise

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        await self.close()
        module = "services.gateway.text.grammar_process"
        command = dying_with_parent([sys.executable, "-m", module], signal.SIGKILL)
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, env=_environment()
        )
        vocabulary = await asyncio.to_thread(GrammarVocabulary.of, self._tokenizer)
        _send(self._process, msgspec.msgpack.encode(vocabulary))
        return self._process


class Grammars:
    """Tries each grammar once, one at a time, and remembers what came of it."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._known: OrderedDict[Asked, Reply] = OrderedDict()
        self._known_characters = 0

    async def grammar(self, asked: Asked, param: str) -> str:
        """Its text. Raises BadRequest, naming `param`, if no answer can follow it, and Overloaded if too many
        wait."""
        if (length := asked.characters) > GRAMMAR_CHARACTERS_MAX:
            raise BadRequest(
                f"'{param}' has {length} characters, but at most {GRAMMAR_CHARACTERS_MAX} can be followed.",
                param,
            )
        reply = self._known.get(asked) or await self._tried(asked)
        if asked in self._known:
            self._known.move_to_end(asked)
        if reply.error:
            raise BadRequest(f"'{param}' cannot be followed: {reply.error}", param)
        return reply.grammar

    async def close(self) -> None:
        await self._trial.close()

    async def _tried(self, asked: Asked) -> Reply:
        if self._waiting >= _WAITING_MAX:
            raise Overloaded("Too many requests wait for their grammar to be tried.")
        self._waiting += 1
        try:
            async with self._turn:
                if asked not in self._known:
                    self._remember(asked, await self._trial.ask(asked))
                return self._known[asked]
        finally:
            self._waiting -= 1

    def _remember(self, asked: Asked, reply: Reply) -> None:
        self._known[asked] = reply
        self._known_characters += _characters(asked, reply)
        while self._known_characters > _KNOWN_CHARACTERS_MAX:
            self._known_characters -= _characters(*self._known.popitem(last=False))


def _characters(asked: Asked, reply: Reply) -> int:
    return asked.characters + len(reply.grammar) + len(reply.error) + 1000


async def _exchange(process: asyncio.subprocess.Process, body: bytes) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    _send(process, body)
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "little")
    return await process.stdout.readexactly(length)


def _send(process: asyncio.subprocess.Process, body: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(len(body).to_bytes(LENGTH_BYTES, "little") + body)


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}
