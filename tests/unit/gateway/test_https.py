"""The API over TLS: clients can check it, files that cannot work are named, renewed ones are taken up."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from services.core.errors import ConfigError
from services.gateway.http_server import Server, server_config
from services.gateway.https import HttpsContext, open_https
from services.launch.authority import Authority, create_authority
from tests.unit.gateway.in_memory_cluster import until
from tests.unit.gateway.test_connection import echo


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "ca")


def context(folder: Path) -> HttpsContext:
    return HttpsContext(folder / "tls.crt", folder / "tls.key")


@asynccontextmanager
async def serving(https: HttpsContext) -> AsyncIterator[str]:
    server = Server(server_config(echo, https.context))
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"https://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        await task


async def ask(url: str, ca: Path) -> str:
    async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=ca)) as http:
        return (await http.post(url, content="hello")).text


async def test_a_client_that_trusts_the_authority_is_answered(ca: Authority, tmp_path: Path) -> None:
    stranger = create_authority(tmp_path / "other")
    async with serving(context(ca.issue("gateway", ["127.0.0.1"], 1))) as url:
        assert await ask(url, ca.folder / "ca.crt") == "hello"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(url, stranger.folder / "ca.crt")


async def test_a_renewed_certificate_serves_new_connections(ca: Authority, tmp_path: Path) -> None:
    folder = ca.issue("gateway", ["127.0.0.1"], 1)
    renewed_by = create_authority(tmp_path / "new")
    https = context(folder)
    async with serving(https) as url:
        assert await ask(url, ca.folder / "ca.crt") == "hello"
        fresh = renewed_by.issue("gateway", ["127.0.0.1"], 1)
        (folder / "tls.key").write_bytes((fresh / "tls.key").read_bytes())
        https.renew()  # half of it: the pair does not fit yet
        assert await ask(url, ca.folder / "ca.crt") == "hello"
        (folder / "tls.crt").write_bytes((fresh / "tls.crt").read_bytes())
        https.renew()
        assert await ask(url, renewed_by.folder / "ca.crt") == "hello"


def test_files_that_cannot_work_are_named(ca: Authority, tmp_path: Path) -> None:
    one, other = ca.issue("one", [], 1), ca.issue("other", [], 1)
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere: No such file"):
        HttpsContext(tmp_path / "nowhere", one / "tls.key")
    with pytest.raises(ConfigError, match=r"other/tls.key is not that of the certificate in .*one/tls.crt"):
        HttpsContext(one / "tls.crt", other / "tls.key")
    with pytest.raises(ConfigError, match="PEM form"):
        HttpsContext(one / "tls.key", one / "tls.key")
    with pytest.raises(ConfigError, match="belong together"):
        open_https(one / "tls.crt", None)
    assert open_https(None, None) is None
