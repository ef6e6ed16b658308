"""A worker has the transports that it is told to have, or says why not."""

import logging

import pytest

from services.core.clock import SystemClock
from services.core.errors import ConfigError
from services.transfer import nixl_agent
from services.transfer.grpc_transport import GrpcKvTransport
from services.transfer.nixl_transport import NixlKvTransport
from services.transfer.pool_memory import PoolMemory
from services.wire.channel import TCP, Network
from services.worker.transports import KvTransports, open_transports, parse_transports
from tests.support.in_process_engine import compatibility, geometry


async def opened(names: list[str], network: Network = TCP) -> KvTransports:
    memory = PoolMemory(geometry(4), memoryview(bytearray(geometry(4).shared_bytes)))
    return await open_transports(names, "w", compatibility(), memory, network, SystemClock())


@pytest.fixture
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "_BUILDS", ("nixl_of_another_planet",))


def test_the_names_are_checked() -> None:
    assert parse_transports(" nixl, grpc") == ["nixl", "grpc"]
    assert parse_transports("grpc") == ["grpc"]
    for wrong in ("", "tcp", "nixl,nixl", "nixl,grpc,tcp"):
        with pytest.raises(ConfigError, match="--transports takes nixl, grpc"):
            parse_transports(wrong)


async def test_nixl_reads_and_is_readable_where_it_is_installed() -> None:
    pytest.importorskip("nixl")
    transports = await opened(["nixl", "grpc"])
    assert isinstance(transports.reading, NixlKvTransport)
    assert transports.nixl_source is not None
    await transports.close()


async def test_without_nixl_a_worker_uses_grpc_and_says_so(
    no_nixl: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    transports = await opened(["nixl", "grpc"])
    assert isinstance(transports.reading, GrpcKvTransport)
    assert transports.nixl_source is None
    assert "KV travels over gRPC alone: the package nixl is not installed" in caplog.text
    await transports.close()


async def test_a_worker_that_is_told_to_use_nothing_but_nixl_does_not_start_without_it(no_nixl: None) -> None:
    with pytest.raises(ConfigError, match=r"--transports nixl: .*pip install 'diptych\[nixl\]'"):
        await opened(["nixl"])


async def test_nixl_does_not_go_past_another_network() -> None:
    transports = await opened(["nixl", "grpc"], Network())
    assert isinstance(transports.reading, GrpcKvTransport)
    await transports.close()
