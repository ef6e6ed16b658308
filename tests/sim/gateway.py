"""A simulated gateway: the production one, served to clients of the same event loop without sockets."""

import asyncio
from types import SimpleNamespace
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from services.core.errors import DiptychError, facts
from services.gateway.api.exchange import Exchange
from services.gateway.api.reply import ChoicesReply
from services.gateway.api.schema import CompletionRequest
from services.gateway.config import GatewayConfig
from services.gateway.door.tenant import Tenant
from services.gateway.door.visits import Visit
from services.gateway.gateway import Gateway
from services.gateway.path.record import Record
from services.gateway.served_model import ServedModel
from services.gateway.text.chat import ChatReader
from services.gateway.text.detokenizer import TokenBytes
from services.gateway.text.tokenizing import Tokenizing
from services.gateway.workers.grpc_worker_client import GrpcWorkerClient
from services.history.memory_history import MemoryHistory
from services.model.chat_template import ChatTemplate
from services.model.tokenizer import Tokenizer
from tests.sim.engine import VOCAB
from tests.sim.loop import Process
from tests.sim.store import StoreClient
from tests.sim.worker import MODEL, World

END_TOKEN = 1


def word(token: int) -> str:
    """The text of a token."""
    return f" w{token}"


def toy_model(context_tokens_max: int) -> ServedModel:
    """A byte-level tokenizer whose every token is a word of its own."""
    backend = tokenizers.Tokenizer(WordLevel({f"Ġw{n}": n for n in range(VOCAB)}, unk_token="Ġw0"))
    backend.decoder = ByteLevel()
    tokenizer = Tokenizer(backend, frozenset({END_TOKEN}), ChatTemplate({}, {}))
    chats = ChatReader.local(tokenizer.chat_template)
    return ServedModel(
        MODEL, context_tokens_max, tokenizer, TokenBytes(backend), Tokenizing(tokenizer), chats
    )


class HttpCall:
    """One request as its client sees it: what has come so far, and how it ended."""

    def __init__(self, body: dict[str, Any], headers: dict[str, str], read_s: float) -> None:
        self.body, self.headers = body, headers
        self.status = 0
        self.received = bytearray()
        self.error = ""  # label of the error that came instead of a 200
        self.whole = False  # the last byte has come
        self.over = asyncio.Event()
        self.gone = asyncio.Event()  # the client has left
        self._read_s = read_s  # between two reads of a slow client

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.gone.is_set():
            return
        assert not self.whole, "bytes after the end of an answer"
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        if self._read_s:
            await asyncio.sleep(self._read_s)
        self.received += message.get("body", b"")
        self.whole = not message.get("more_body", False)


class _CountingClient(GrpcWorkerClient):
    """Counts the answers that went on elsewhere after some tokens."""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__(world.network.of(process))
        self._world = world

    async def decode(self, worker: Any, sequence: Any, source: Any, deliver: Any) -> None:
        if any(sequence.output_ids):
            self._world.events["resumptions"] += 1
        await super().decode(worker, sequence, source, deliver)


class SimGateway:
    def __init__(self, world: World, name: str, config: GatewayConfig, context_tokens_max: int) -> None:
        self._world, self.name, self._config = world, name, config
        self._model = toy_model(context_tokens_max)
        self.start()

    def start(self) -> None:
        world = self._world
        self.process = Process(world.loop, self.name)
        self._calls: list[HttpCall] = []
        self.workers = _CountingClient(world, self.process)
        membership = StoreClient(world.store, self.process, world.store.membership)
        index = StoreClient(world.store, self.process, world.store.index)
        self.gateway = Gateway(
            self._config,
            self._model,
            membership,
            index,
            self.workers,
            MemoryHistory(world.clock, ttl_s=3600),  # type: ignore[arg-type]
            world.clock,  # type: ignore[arg-type]
        )
        self.process.start(self._follow())

    @property
    def alive(self) -> bool:
        return not self.process.dead

    def open(self, request_id: str, call: HttpCall) -> None:
        """A client's request has come."""
        self._calls.append(call)
        self.process.start(self._respond(request_id, call))

    def kill(self) -> None:
        self._world.trace.note(self.name, "is killed")
        self.process.kill()
        self._world.network.died(self.process)
        for call in self._calls:
            call.over.set()

    async def close(self) -> None:
        """What the process does at its end."""
        self._following.cancel()
        await self.workers.close()

    def complaints(self) -> list[str]:
        if not self.alive:
            return []
        gateway, found = self.gateway, []
        if gateway.admission._inflight:
            found.append(f"{gateway.admission._inflight} requests in flight when quiet")
        if len(gateway.queue):
            found.append(f"{len(gateway.queue)} requests in the queue when quiet")
        if gateway.queue._dispatcher is not None and not gateway.queue._dispatcher.done():
            found.append("the queue's dispatcher runs when quiet")
        if len(gateway.queue._places.commitments):
            found.append(f"{len(gateway.queue._places.commitments)} commitments when quiet")
        if parts := gateway.view.in_flight.parts:
            found.append(f"work counted as in flight when quiet: {parts}")
        for session in self.workers._sessions.values():
            if session._open:
                found.append(f"sequences left in a decode session: {list(session._open)}")
        return [f"{self.name}: {complaint}" for complaint in found]

    def overfull(self) -> str | None:
        """A bound that is passed, if there is one. Whoever finds the queue empty may be larger than all
        bounds, and attempts that failed come back to it."""
        if not self.alive:
            return None
        config, gateway = self._config, self.gateway
        new = [ticket for ticket in gateway.queue if not ticket.had_turn and not ticket.begun]
        sequences, tokens = sum(len(ticket.sequence.choices) for ticket in new), sum(t.cost for t in new)
        if len(new) > 1 and (sequences > config.queue_length_max or tokens > config.queue_tokens_max):
            return f"{self.name}: {sequences} answers of {tokens} tokens wait"
        if (
            len(gateway.queue) > gateway.admission._inflight * 4
            or gateway.admission._inflight > config.inflight_max
        ):
            return f"{self.name}: {len(gateway.queue)} wait, of {gateway.admission._inflight} requests"
        return None

    async def _follow(self) -> None:
        self._following = asyncio.current_task()
        await self.gateway.view.follow(self._config.membership_poll_s)

    async def _respond(self, request_id: str, call: HttpCall) -> None:
        state = SimpleNamespace(
            request_id=request_id,
            client_request_id=request_id,
            received_at=self._world.clock.now(),
            visit=Visit(Tenant.of(call.headers.get("authorization"))),
        )
        body = CompletionRequest.model_validate(call.body)
        http = SimpleNamespace(state=state)
        record = Record("completions", self.gateway.clock, self.gateway.metrics, state.received_at)
        reply = ChoicesReply(body, self.gateway.prompts, record, request_id)
        exchange = Exchange(self.gateway, reply, http)  # type: ignore[arg-type]
        try:
            await exchange({"type": "http"}, call.receive, call.send)
        except DiptychError as error:
            call.status, call.error, call.whole = facts(error).http_status, facts(error).label, True
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if self.alive:
                self._world.on_bug(f"{self.name}: request {request_id} broke: {error!r}")
        finally:
            self._calls.remove(call)
            call.over.set()
