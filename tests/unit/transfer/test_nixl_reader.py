"""One-sided reads between two processes: right bytes, and no byte after a read has ended."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from services.core.errors import KvLinkLost
from services.transfer import nixl_reader
from services.transfer.nixl_agent import Range
from services.transfer.nixl_reader import NixlReader
from tests.support.nixl_source import NixlSourceProcess, shared_memory

pytest.importorskip("nixl")

BLOCKS, BLOCK_BYTES = 64, 1 << 18
ALL = [Range(0, 0, BLOCKS * BLOCK_BYTES)]


@pytest.fixture(params=["best", "tcp"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What UCX would choose itself (between processes of one machine it copies directly), and TCP,
    where the source takes part in every read."""
    if request.param != "best":
        monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


class Reader:
    def __init__(self) -> None:
        self.memory = shared_memory(BLOCKS * BLOCK_BYTES)
        self.reader = NixlReader("reader", self.memory)

    async def read(self, source: NixlSourceProcess, ranges: list[Range] = ALL, name: str = "s") -> None:
        async with asyncio.timeout(20):
            await self.reader.read(name, source.pool, ranges)

    def blocks(self) -> list[int]:
        """The first byte of every block."""
        return [self.memory[block * BLOCK_BYTES] for block in range(BLOCKS)]


@pytest.fixture
async def reader() -> AsyncIterator[Reader]:
    reader = Reader()
    await reader.reader.start()
    yield reader
    await reader.reader.close()


async def test_scattered_blocks_land_in_their_places_and_nothing_else_is_touched(reader: Reader) -> None:
    with NixlSourceProcess(BLOCKS, BLOCK_BYTES) as source:
        pairs = [(5, 9), (6, 10), (63, 0), (2, 31)]
        ranges = [Range(theirs * BLOCK_BYTES, ours * BLOCK_BYTES, BLOCK_BYTES) for theirs, ours in pairs]
        await reader.read(source, ranges)
    expected = bytearray(BLOCKS * BLOCK_BYTES)
    for theirs, ours in pairs:
        expected[ours * BLOCK_BYTES : (ours + 1) * BLOCK_BYTES] = bytes([theirs + 1]) * BLOCK_BYTES
    assert reader.memory == expected


async def test_a_source_that_dies_ends_the_read_and_its_successor_is_readable(reader: Reader) -> None:
    with NixlSourceProcess(BLOCKS, BLOCK_BYTES) as source:
        await reader.read(source)
        source.process.kill()
        source.process.wait()
        with pytest.raises(KvLinkLost):
            await reader.read(source)
    with NixlSourceProcess(BLOCKS, BLOCK_BYTES) as successor:
        await reader.read(successor)
    assert reader.blocks() == list(range(1, BLOCKS + 1))


async def test_nothing_lands_after_a_cancelled_read_has_ended(
    reader: Reader, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_reader, "_GIVEN_UP_S", 0.3)
    with NixlSourceProcess(BLOCKS, BLOCK_BYTES) as source:
        await reader.read(source)
        source.stop()
        reading = asyncio.create_task(reader.read(source))
        await asyncio.wait([reading], timeout=5 if transport == "best" else 0.2)
        assert reading.done() == (transport == "best"), "the kernel copies from a stopped process; TCP cannot"
        reading.cancel()
        await asyncio.wait([reading])
        reader.memory[:] = bytes(len(reader.memory))
        source.resume()
        await asyncio.sleep(0.5)
        assert reader.blocks() == [0] * BLOCKS, "a block was written after its read had ended"


async def test_a_read_that_makes_no_progress_fails_by_itself(
    reader: Reader, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport == "best":
        pytest.skip("the kernel copies from a stopped process")
    monkeypatch.setattr(nixl_reader, "_STUCK_S", 0.3)
    with NixlSourceProcess(BLOCKS, BLOCK_BYTES) as source:
        await reader.read(source)
        source.stop()
        with pytest.raises(KvLinkLost, match="no read got done"):
            await reader.read(source)


async def test_sources_that_restart_again_and_again_leave_nothing_behind(reader: Reader) -> None:
    held: list[int] = []
    for _ in range(4):
        with NixlSourceProcess(2, BLOCK_BYTES) as source:
            await reader.read(source, [Range(0, 0, BLOCK_BYTES)])
            held.append(len(os.listdir("/proc/self/fd")))
        assert len(reader.reader._peers) == 1
    assert held[-1] <= held[1]


async def test_the_event_loop_turns_while_blocks_are_read(reader: Reader) -> None:
    with NixlSourceProcess(BLOCKS, BLOCK_BYTES) as source:
        await reader.read(source)
        turns = 0
        reading = asyncio.create_task(reader.read(source))
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 3


async def test_a_range_outside_of_the_pools_is_refused(reader: Reader) -> None:
    with NixlSourceProcess(2, BLOCK_BYTES) as source:
        for wrong in (Range(BLOCK_BYTES + 1, 0, BLOCK_BYTES), Range(0, -1, 1), Range(-1, 0, 1)):
            with pytest.raises(KvLinkLost, match="outside"):
                await reader.read(source, [wrong])


def test_a_process_with_an_agent_still_ends_with_its_terminal() -> None:
    with NixlSourceProcess(1, BLOCK_BYTES) as source:
        source.process.send_signal(signal.SIGHUP)
        assert source.process.wait(10) == -signal.SIGHUP


async def test_a_reader_that_is_closed_fails_its_reads(reader: Reader) -> None:
    with NixlSourceProcess(BLOCKS, BLOCK_BYTES) as source:
        await reader.reader.close()
        with pytest.raises(KvLinkLost, match="stops"):
            await reader.read(source)
