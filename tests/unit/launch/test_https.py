"""Commands check the certificate of an https gateway, and say what to do about one they do not trust."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.core.errors import ConfigError
from services.gateway.http_server import Server, server_config
from services.gateway.https import HttpsContext
from services.launch.authority import Authority, create_authority
from services.launch.cli import main
from services.launch.cluster_state import ClusterState, write_state
from services.launch.https import trusting, trusting_only
from services.launch.readiness import GatewayReadiness
from tests.unit.gateway.in_memory_cluster import until


async def no_workers(scope: Any, receive: Any, send: Any) -> None:
    """As far as `status` asks."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"[]"})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "ca")


@pytest.fixture
async def url(ca: Authority) -> AsyncIterator[str]:
    """Of a gateway whose certificate says 127.0.0.1."""
    folder = ca.issue("gateway", ["127.0.0.1"], 1)
    server = Server(server_config(no_workers, HttpsContext(folder / "tls.crt", folder / "tls.key").context))
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task


async def test_the_authority_is_named_by_a_flag(url: str, ca: Authority) -> None:
    status = ["status", "--url", url]
    assert await asyncio.to_thread(main, [*status, "--ca", str(ca.folder / "ca.crt")]) == 0
    assert await asyncio.to_thread(main, status) == 1


async def test_a_certificate_that_is_not_trusted_is_told_with_the_way_out(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(main, ["chat", "hello", "--url", f"{url}/v1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--ca FILE" in error


async def test_the_gateway_of_up_is_known_by_its_certificate_alone(
    url: str, ca: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ca.issue("other", ["127.0.0.1"], 1) / "tls.crt"
    assert await GatewayReadiness(url, trusting_only(ca.folder / "gateway/tls.crt"))()
    assert not await GatewayReadiness(url, trusting_only(other))()
    write_state(ClusterState(url, "redis://", os.getpid(), gateway_cert=str(other)))
    assert await asyncio.to_thread(main, ["chat", "hello"]) == 1
    assert "is not trusted" in capsys.readouterr().err
    write_state(ClusterState(url, "redis://", os.getpid(), gateway_cert=str(ca.folder / "gateway/tls.crt")))
    assert await asyncio.to_thread(main, ["chat", "hello"]) == 1
    assert "does not answer like an OpenAI API" in capsys.readouterr().err  # it was heard


def test_an_authority_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        trusting(tmp_path / "nowhere")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty"):
        trusting_only(tmp_path / "empty")
