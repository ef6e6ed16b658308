"""Chat templates, rendered where they can do no harm.

A template is a program of the model's author or of a client: it may loop, or make gigabytes. So each runs
in a child process with limits on memory and on processor time, and the event loop only waits for it.
There are three such children, each started when it is first needed and kept: one for the model's template,
one for long conversations with it, and one for the templates of clients, so that none delays the others.
"""

import asyncio
import logging
import pickle
import signal
from typing import Protocol

import msgspec

from services.core.errors import BadRequest, Overloaded
from services.gateway.text.child_process import ChildProcess
from services.gateway.text.template_process import Limits, Refused, Reply, Setup
from services.model.chat_template import Chat, ChatTemplate

logger = logging.getLogger(__name__)

LONG_BYTES = 64 << 10  # of a chat: a child takes about a millisecond for them
WAITING_MAX = 1024  # for one child: as many as a gateway lets in by default
FOREIGN_WAITING_MAX = 16  # for that of clients' templates, each of which may take all of its time
_WALL_TIMES = 5  # times the processor time allowed: that long it may take on a busy machine
_START_S = 30.0  # it takes a tenth of a second


class ChatRenderer(Protocol):
    async def start(self) -> None:
        """Before the first request needs it."""
        ...

    async def render(self, chat: Chat) -> str:
        """The prompt text. Raises BadRequest if the template refuses, fails or overruns its limits, and
        Overloaded if too many wait."""
        ...

    async def close(self) -> None: ...


class LocalRenderer:
    """In this process and without limits: for tests and tools that serve nobody."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    async def start(self) -> None:
        pass

    async def render(self, chat: Chat) -> str:
        return self._template.render(chat)

    async def close(self) -> None:
        pass


class ProcessRenderer:
    """Use it in the main thread only: children die with the thread that started them."""

    def __init__(self, template: ChatTemplate, limits: Limits) -> None:
        setup = Setup(dict(template.sources), dict(template.special_tokens), limits)
        self.short, self.long = TemplateChild(setup, WAITING_MAX), TemplateChild(setup, WAITING_MAX)
        self.foreign = TemplateChild(setup, FOREIGN_WAITING_MAX)

    async def start(self) -> None:
        await self.short.start()

    async def render(self, chat: Chat) -> str:
        body = _pickled(chat)
        if chat.template is not None:
            child = self.foreign
        else:
            child = self.long if len(body) > LONG_BYTES else self.short
        return await child.render(body, chat.template_param)

    async def close(self) -> None:
        for child in (self.short, self.long, self.foreign):
            await child.end()


class TemplateChild:
    """One process, and those who wait for it. It does one thing at a time, so what ends it is known."""

    def __init__(self, setup: Setup, waiting_max: int) -> None:
        self._setup, self._waiting_max = setup, waiting_max
        self._waiting = 0
        self._turn = asyncio.Lock()
        self._child = ChildProcess("services.gateway.text.template_process")

    @property
    def pid(self) -> int | None:
        return self._child.pid

    async def start(self) -> None:
        async with self._turn:
            await self._ensure_running()

    async def render(self, body: bytes, param: str) -> str:
        if self._waiting >= self._waiting_max:
            raise Overloaded("Too many requests wait for their chat template.")
        self._waiting += 1
        try:
            async with self._turn:
                reply = await self._reply(body, param)
        finally:
            self._waiting -= 1
        if isinstance(reply, Refused):
            raise BadRequest(reply.message, reply.param, reply.code)
        return reply.text

    async def end(self) -> None:
        """Kill the process. The next to need one starts another."""
        await self._child.end()

    async def _reply(self, body: bytes, param: str) -> Reply:
        """A child may also die for no fault of the template: then another one tries, once."""
        for attempt in (1, 2):
            await self._ensure_running()
            try:
                async with asyncio.timeout(self._setup.limits.seconds * _WALL_TIMES):
                    reply: Reply = msgspec.msgpack.decode(await self._child.exchange(body), type=Reply)
                    return reply
            except (asyncio.IncompleteReadError, ConnectionError):
                code = await self._child.exit_code()
            except TimeoutError:
                code = -signal.SIGPROF
            except BaseException:
                await self.end()  # it is in the middle of something that nobody waits for any more
                raise
            await self.end()
            if code == -signal.SIGPROF:
                seconds = self._setup.limits.seconds
                raise BadRequest(f"The chat template takes more than {seconds:g} s on these messages.", param)
            logger.error("a process for chat templates ended with code %d (attempt %d)", code, attempt)
        raise BadRequest("The chat template crashes on these messages.", param)

    async def _ensure_running(self) -> None:
        if self._child.running:
            return
        await self._child.start()
        try:
            async with asyncio.timeout(_START_S):
                await self._child.exchange(msgspec.msgpack.encode(self._setup))
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._child.exit_code()
            raise RuntimeError(f"a process for chat templates ended with code {code} at its start") from None
        except BaseException:
            await self.end()
            raise


def _pickled(chat: Chat) -> bytes:
    """Unlike JSON it bounds neither integers nor strings; the child trusts us."""
    try:
        return pickle.dumps(chat, protocol=5)
    except RecursionError:
        raise BadRequest("The chat is nested too deeply.", chat.template_param) from None
