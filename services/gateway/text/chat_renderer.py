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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
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
BATCH_MAX = 64  # short chats in one exchange: a few milliseconds
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
        self.short = TemplateChild(setup, WAITING_MAX, BATCH_MAX)
        self.long = TemplateChild(setup, WAITING_MAX, 1)
        self.foreign = TemplateChild(setup, FOREIGN_WAITING_MAX, 1)

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


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A chat that is to be rendered."""

    body: bytes
    param: str  # that the template or its messages came in
    reply: asyncio.Future[Reply]


class TemplateChild:
    """One process, and the chats that wait for it.

    Those that have come while it was busy go to it together, at most `batch_max`: an exchange with a process
    takes some turns of the event loop, which are long when many streams are open. A batch that ends the
    process is tried again chat by chat, so what ended it is known and the others get their texts.
    """

    def __init__(self, setup: Setup, waiting_max: int, batch_max: int) -> None:
        self._setup, self._waiting_max, self._batch_max = setup, waiting_max, batch_max
        self._waiting = 0
        self._queue: deque[_Waiting] = deque()
        self._serving: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._child = ChildProcess("services.gateway.text.template_process")

    @property
    def pid(self) -> int | None:
        return self._child.pid

    async def start(self) -> None:
        async with self._starting:
            await self._ensure_running()

    async def render(self, body: bytes, param: str) -> str:
        if self._waiting >= self._waiting_max:
            raise Overloaded("Too many requests wait for their chat template.")
        one = _Waiting(body, param, asyncio.get_running_loop().create_future())
        self._queue.append(one)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        self._waiting += 1
        try:
            reply = await one.reply
        finally:
            self._waiting -= 1
        if isinstance(reply, Refused):
            raise BadRequest(reply.message, reply.param or param, reply.code)
        return reply.text

    async def end(self) -> None:
        """Kill the process. The next to need one starts another."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        await self._child.end()

    async def _serve(self) -> None:
        """Until nobody waits."""
        while batch := self._next_batch():
            try:
                replies = await self._replies(batch)
            except Exception as error:
                for one in batch:
                    if not one.reply.done():
                        one.reply.set_exception(error)
                continue
            for one, reply in zip(batch, replies, strict=True):
                if not one.reply.done():  # its client may have gone
                    one.reply.set_result(reply)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self._batch_max:
            one = self._queue.popleft()
            if not one.reply.done():
                batch.append(one)
        return batch

    async def _replies(self, batch: Sequence[_Waiting]) -> list[Reply]:
        if len(batch) > 1:
            try:
                return await self._exchange(batch)
            except _ProcessEnded:
                pass
        return [await self._reply(one) for one in batch]

    async def _reply(self, one: _Waiting) -> Reply:
        """A child may also die for no fault of the template: then another one tries, once."""
        for attempt in (1, 2):
            try:
                return (await self._exchange([one]))[0]
            except _ProcessEnded as ended:
                if ended.code == -signal.SIGPROF:
                    seconds = self._setup.limits.seconds
                    problem = f"The chat template takes more than {seconds:g} s on these messages."
                    return Refused(problem, one.param, None)
                logger.error(
                    "a process for chat templates ended with code %d (attempt %d)", ended.code, attempt
                )
        return Refused("The chat template crashes on these messages.", one.param, None)

    async def _exchange(self, batch: Sequence[_Waiting]) -> list[Reply]:
        """Raises _ProcessEnded."""
        await self.start()
        try:
            async with asyncio.timeout(self._setup.limits.seconds * _WALL_TIMES):
                frame = msgspec.msgpack.encode([one.body for one in batch])
                return msgspec.msgpack.decode(await self._child.exchange(frame), type=list[Reply])
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._child.exit_code()
        except TimeoutError:
            code = -signal.SIGPROF
        except BaseException:
            await self._child.end()  # an answer may be half read
            raise
        await self._child.end()
        raise _ProcessEnded(code)

    async def _ensure_running(self) -> None:
        if self._child.running:
            return
        await self._child.start()
        try:
            async with asyncio.timeout(_START_S):
                await self._child.exchange(msgspec.msgpack.encode(self._setup))
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._child.exit_code()
            await self._child.end()
            raise _ProcessEnded(code) from None
        except BaseException:
            await self._child.end()
            raise


class _ProcessEnded(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"a process for chat templates ended with code {code}")
        self.code = code  # -N: signal N ended it


def _pickled(chat: Chat) -> bytes:
    """Unlike JSON it bounds neither integers nor strings; the child trusts us."""
    try:
        return pickle.dumps(chat, protocol=5)
    except RecursionError:
        raise BadRequest("The chat is nested too deeply.", chat.template_param) from None
