"""Grammars that were tried: the only ones that workers get."""

import asyncio
import logging
from collections import OrderedDict
from functools import lru_cache
from typing import Protocol

import msgspec
from llguidance import LLTokenizer

from services.core.errors import BadRequest, EngineFailed, Overloaded
from services.gateway.text.child_process import ChildProcess
from services.gateway.text.grammar import Asked
from services.gateway.text.grammar_process import PROCESSOR_S, Reply, in_large_thread, tried
from services.model.grammar import GRAMMAR_CHARACTERS_MAX, GrammarVocabulary
from services.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_WAITING_MAX = 64
_KNOWN_CHARACTERS_MAX = 8 << 20  # of all texts that are remembered, asked and made
_WALL_S = 20 * PROCESSOR_S  # a machine may be busy; and the process starts within it


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
        self._child = ChildProcess("services.gateway.text.grammar_process")

    async def ask(self, asked: Asked) -> Reply:
        """Raises EngineFailed if the process does not answer, for whatever reason but the grammar.

        A process may end for no fault of the grammar: then another one tries, once."""
        for last in (False, True):
            try:
                return await self._exchange(asked)
            except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
                await self.close()
                logger.error("the process that tries grammars does not answer (%r)", error)
                if last or isinstance(error, TimeoutError):
                    break
        raise EngineFailed("The grammar could not be tried. Try again in a moment.")

    async def _exchange(self, asked: Asked) -> Reply:
        try:
            async with asyncio.timeout(_WALL_S):
                if not self._child.running:
                    await self._start()
                answer = await self._child.exchange(msgspec.msgpack.encode(asked))
                return msgspec.msgpack.decode(answer, type=Reply)
        except BaseException:
            await self.close()  # an answer may be half read
            raise

    async def close(self) -> None:
        await self._child.end()

    async def _start(self) -> None:
        await self._child.start()
        vocabulary = await asyncio.to_thread(GrammarVocabulary.of, self._tokenizer)
        self._child.send(msgspec.msgpack.encode(vocabulary))


class Grammars:
    """Tries each grammar once, one at a time, and remembers what came of it."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._turn = asyncio.Lock()
        self._trying: dict[Asked, asyncio.Task[Reply]] = {}
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
        if asked in self._known:
            self._known.move_to_end(asked)
        reply = self._known.get(asked) or await self._tried(asked)
        if reply.error:
            raise BadRequest(f"'{param}' cannot be followed: {reply.error}", param)
        return reply.grammar

    async def close(self) -> None:
        for trying in self._trying.values():
            trying.cancel()
        if self._trying:
            await asyncio.wait(self._trying.values())
        await self._trial.close()

    async def _tried(self, asked: Asked) -> Reply:
        """A trial goes on when its client goes: to end it would cost the next client a new process, and its
        reply may be asked for again."""
        trying = self._trying.get(asked)
        if trying is None:
            if len(self._trying) >= _WAITING_MAX:
                raise Overloaded("Too many requests wait for their grammar to be tried.")
            trying = self._trying[asked] = asyncio.create_task(self._try(asked))
            trying.add_done_callback(_seen)
        return await asyncio.shield(trying)

    async def _try(self, asked: Asked) -> Reply:
        try:
            async with self._turn:
                reply = await self._trial.ask(asked)
            self._remember(asked, reply)
            return reply
        finally:
            del self._trying[asked]

    def _remember(self, asked: Asked, reply: Reply) -> None:
        self._known[asked] = reply
        self._known_characters += _characters(asked, reply)
        while self._known_characters > _KNOWN_CHARACTERS_MAX:
            self._known_characters -= _characters(*self._known.popitem(last=False))


def _seen(trying: asyncio.Task[Reply]) -> None:
    """Its error is told to whoever waits; nobody may."""
    if not trying.cancelled():
        trying.exception()


def _characters(asked: Asked, reply: Reply) -> int:
    return asked.characters + len(reply.grammar) + len(reply.error) + 1000
