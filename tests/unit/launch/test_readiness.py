"""Readiness: a worker's own report, of this incarnation; the gateway's own answer."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest

from services.core.block_hash import Compatibility
from services.core.clock import ManualClock
from services.core.worker_report import WorkerReport
from services.launch.readiness import GatewayReadiness, WorkerReadiness
from services.membership.memory_membership import MemoryMembership

STARTING = WorkerReport(
    worker_id="prefill-0",
    epoch=1,
    role="prefill",
    state="draining",
    address="127.0.0.1:1",
    served_model="m",
    compatibility=Compatibility(model="m", revision="r", layout="l"),
    context_tokens_max=1,
)


def ready(epoch: int, worker_id: str = "prefill-0") -> WorkerReport:
    return msgspec.structs.replace(STARTING, state="ready", epoch=epoch, worker_id=worker_id)


async def test_a_worker_is_ready_when_its_report_says_so() -> None:
    membership = MemoryMembership(ManualClock())
    readiness = WorkerReadiness(membership, "prefill-0")
    assert not await readiness()
    await membership.announce(ready(1, worker_id="prefill-1"))
    await membership.announce(STARTING)
    assert not await readiness()
    await membership.announce(ready(1))
    assert await readiness()


async def test_the_report_of_a_dead_incarnation_does_not_pass_for_its_successors() -> None:
    membership = MemoryMembership(ManualClock())
    readiness = WorkerReadiness(membership, "prefill-0")
    await membership.announce(ready(1))
    assert await readiness()
    assert not await readiness()  # killed; its lease still runs
    await membership.announce(ready(2))
    assert await readiness()


async def test_nothing_is_ready_while_the_store_is_away() -> None:
    membership = MemoryMembership(ManualClock())
    membership.available = False
    assert not await WorkerReadiness(membership, "prefill-0")()


class Health(BaseHTTPRequestHandler):
    status = 503
    cluster_status = 200

    workers: tuple[str, ...] = ()

    def do_GET(self) -> None:
        self.send_response(self.cluster_status if self.path == "/v1/cluster" else self.status)
        self.end_headers()
        if self.path == "/v1/cluster":
            self.wfile.write(json.dumps([{"worker_id": name} for name in self.workers]).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), type("OwnHealth", (Health,), {})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def test_a_gateway_is_ready_when_it_answers_200(server: HTTPServer) -> None:
    readiness = GatewayReadiness(f"http://127.0.0.1:{server.server_port}")
    assert not await readiness()
    server.RequestHandlerClass.status = 200  # type: ignore[attr-defined]
    assert await readiness()


async def test_a_gateway_knows_the_workers_that_it_lists(server: HTTPServer) -> None:
    readiness = GatewayReadiness(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass.workers = ("decode-0",)  # type: ignore[attr-defined]
    assert await readiness.knows({"decode-0"})
    assert not await readiness.knows({"decode-0", "prefill-0"})
    assert not await GatewayReadiness("http://127.0.0.1:1").knows({"decode-0"})


async def test_a_gateway_that_wants_an_api_key_is_not_asked_whom_it_knows(server: HTTPServer) -> None:
    readiness = GatewayReadiness(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass.cluster_status = 500  # type: ignore[attr-defined]
    assert not await readiness.knows({"decode-0"})
    server.RequestHandlerClass.cluster_status = 401  # type: ignore[attr-defined]
    assert await readiness.knows({"decode-0"})


async def test_a_gateway_that_does_not_listen_is_not_ready() -> None:
    assert not await GatewayReadiness("http://127.0.0.1:1")()
