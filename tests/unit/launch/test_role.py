"""`diptych role` changes the role of the worker it names, and of no other."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from services.core.clock import SystemClock
from services.core.worker_report import Role, WorkerKey
from services.engine.incarnation import Incarnation
from services.launch.cli import main
from services.launch.role import decodes_without
from services.membership.redis_membership import RedisMembership
from services.wire.channel import listen, new_server
from services.wire.generated import worker_pb2_grpc
from services.worker.control import ControlService
from tests.unit.launch.test_status import REPORT


class Subject:
    """A worker as far as its role goes: listed in Redis, with a Control service behind its address."""

    def __init__(self, redis_url: str, name: str) -> None:
        self.url, self.name = redis_url, name
        self.incarnation = Incarnation(WorkerKey(name, 1), "prefill", SystemClock(), lease_s=3600.0)
        self.changes = 0

    def changed(self) -> None:
        self.changes += 1

    async def role(self, worker: str, role: Role) -> int:
        """The command's exit code."""
        return await asyncio.to_thread(main, ["role", worker, role, "--redis", self.url])


@pytest.fixture
async def subject(valkey_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    subject = Subject(valkey_url, f"w-{request.node.name}")
    server = new_server()
    worker_pb2_grpc.add_ControlServicer_to_server(
        ControlService(subject.incarnation, subject.changed), server
    )
    address = f"127.0.0.1:{listen(server, '127.0.0.1', 0)}"
    await server.start()
    membership = RedisMembership(valkey_url, ttl_s=60)
    for name in (subject.name, "successor"):  # another worker has taken the port of "successor"
        await membership.announce(
            msgspec.structs.replace(REPORT, worker_id=name, address=address, role="prefill")
        )
    yield subject
    for name in (subject.name, "successor"):
        await membership.leave(WorkerKey(name, REPORT.epoch))
    await membership.close()
    await server.stop(0)


async def test_the_role_changes_at_once(subject: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    assert await subject.role(subject.name, "both") == 0
    assert subject.incarnation.role == "both"
    assert subject.changes == 1
    assert capsys.readouterr().out == f"{subject.name}: prefill -> both\n"


async def test_the_same_role_again_changes_nothing(subject: Subject) -> None:
    assert await subject.role(subject.name, "prefill") == 0
    assert subject.changes == 0


async def test_a_worker_that_nobody_knows_is_named_with_those_there_are(
    subject: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await subject.role("nobody", "both") == 1
    error = capsys.readouterr().err
    assert "'nobody'" in error
    assert subject.name in error


async def test_a_worker_that_took_anothers_address_keeps_its_role(
    subject: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await subject.role("successor", "both") == 1
    assert subject.incarnation.role == "prefill"
    assert f"belongs to {subject.name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("role", "other_role", "decodes"),
    [("prefill", "prefill", False), ("prefill", "both", True), ("decode", "prefill", True)],
)
def test_a_cluster_in_which_nobody_decodes_is_noticed(role: Role, other_role: Role, decodes: bool) -> None:
    other = msgspec.structs.replace(REPORT, worker_id="other", role=other_role)
    assert decodes_without([REPORT, other], REPORT, role) is decodes


def test_a_worker_that_is_about_to_stop_does_not_count_as_decoding() -> None:
    other = msgspec.structs.replace(REPORT, worker_id="other", role="both", state="draining")
    assert not decodes_without([REPORT, other], REPORT, "prefill")
