"""What becomes of the reads in flight when the reader's agent is destroyed, with a scripted agent."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from services.core.errors import KvLinkLost
from services.transfer import nixl_reader
from services.transfer.nixl_agent import NixlAgent, Range
from services.transfer.nixl_reader import NixlReader, RemotePool

POOL = RemotePool(b"metadata", 0, 100)


class Agents:
    """Makes agents; a read ends as `outcomes` says for its first byte: missing, it goes on and on."""

    def __init__(self) -> None:
        self.made = 0
        self.outcomes: dict[int, str] = {}
        self.bug: Exception | None = None  # that connecting raises, once
        self.posted: list[tuple[int, int]] = []  # number of the agent, first byte

    def __call__(self, owner: str, memory: memoryview) -> "ScriptedAgent":
        self.made += 1
        return ScriptedAgent(self, self.made)


class ScriptedAgent:
    def __init__(self, agents: Agents, number: int) -> None:
        self._agents, self._number = agents, number

    def add_peer(self, metadata: bytes) -> str:
        if bug := self._agents.bug:
            self._agents.bug = None
            raise bug
        return metadata.decode()

    def post_read(self, peer: str, peer_address: int, ranges: Sequence[Range]) -> int:
        self._agents.posted.append((self._number, ranges[0].remote))
        return ranges[0].remote

    def is_done(self, handle: int) -> bool:
        outcome = self._agents.outcomes.get(handle)
        if outcome == "breaks":
            del self._agents.outcomes[handle]
            raise KvLinkLost("the cable was pulled")
        return outcome == "arrives"

    def close(self) -> None:
        pass


@pytest.fixture
def agents() -> Agents:
    return Agents()


@pytest.fixture
async def reader(agents: Agents) -> AsyncIterator[NixlReader]:
    reader = NixlReader("reader", memoryview(bytearray(100)), agents)  # type: ignore[arg-type]
    await reader.start()
    yield reader
    await reader.close()


def begin(reader: NixlReader, first_byte: int) -> "asyncio.Task[None]":
    return asyncio.create_task(reader.read("source", POOL, [Range(first_byte, first_byte, 1)]))


async def posted(agents: Agents, count: int) -> None:
    async with asyncio.timeout(5):
        while len(agents.posted) < count:
            await asyncio.sleep(0.001)


async def test_a_read_that_breaks_fails_and_the_others_are_begun_again(
    reader: NixlReader, agents: Agents
) -> None:
    broken, patient = begin(reader, 1), begin(reader, 2)
    await posted(agents, 2)
    agents.outcomes[1] = "breaks"
    with pytest.raises(KvLinkLost, match="the cable was pulled"):
        await broken
    await posted(agents, 3)
    assert not patient.done()
    agents.outcomes[2] = "arrives"
    await patient
    assert agents.posted == [(1, 1), (1, 2), (2, 2)]


async def test_a_read_is_begun_again_only_once(reader: NixlReader, agents: Agents) -> None:
    unlucky = begin(reader, 9)
    await posted(agents, 1)
    for number in (1, 2):
        culprit = begin(reader, number)
        await posted(agents, 2 * number)
        agents.outcomes[number] = "breaks"
        with pytest.raises(KvLinkLost):
            await culprit
        if number == 1:
            await posted(agents, 3)
    with pytest.raises(KvLinkLost, match="broken off"):
        await unlucky
    assert agents.made == 2, "an agent was made for no read"


async def test_a_cancelled_read_is_not_begun_again(reader: NixlReader, agents: Agents) -> None:
    cancelled, broken = begin(reader, 1), begin(reader, 2)
    await posted(agents, 2)
    cancelled.cancel()
    await asyncio.sleep(0.01)
    assert not cancelled.done(), "the read may still write"
    agents.outcomes[2] = "breaks"
    with pytest.raises(KvLinkLost):
        await broken
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert len(agents.posted) == 2


async def test_a_read_that_cannot_even_begin_fails_and_those_behind_it_end_too(
    reader: NixlReader, agents: Agents
) -> None:
    agents.bug, agents.outcomes[2] = RuntimeError("an error of the bindings"), "arrives"
    broken, behind = begin(reader, 1), begin(reader, 2)
    async with asyncio.timeout(5):
        with pytest.raises(KvLinkLost, match="of the bindings"):
            await broken
        await behind


async def test_an_agent_that_breaks_in_an_unknown_way_ends_the_start() -> None:
    def broken(owner: str, memory: memoryview) -> NixlAgent:
        raise RuntimeError("an error of the bindings")

    async with asyncio.timeout(5):
        with pytest.raises(RuntimeError, match="of the bindings"):
            await NixlReader("reader", memoryview(bytearray(100)), broken).start()


async def test_a_read_that_never_ends_fails_though_others_get_done(
    reader: NixlReader, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_reader, "_ENDLESS_S", 0.2)
    agents.outcomes[2] = "arrives"
    stuck = begin(reader, 1)
    async with asyncio.timeout(5):
        while not stuck.done():
            await begin(reader, 2)
            await asyncio.sleep(0.01)
    with pytest.raises(KvLinkLost, match="has not ended"):
        await stuck


async def test_closing_fails_what_is_in_flight(reader: NixlReader, agents: Agents) -> None:
    reading = begin(reader, 1)
    await posted(agents, 1)
    await reader.close()
    with pytest.raises(KvLinkLost, match="stops"):
        await reading
