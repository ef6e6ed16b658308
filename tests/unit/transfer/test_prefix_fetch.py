"""Prefixes fetched between real services: the same tokens with less computing, whatever goes wrong."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from services.core.block_hash import Compatibility
from services.core.clock import ManualClock
from services.core.errors import DiptychError, KvLinkLost, KvSourceLost, facts
from services.transfer.destination import Destination
from services.transfer.fetch import (
    AVOID_S,
    PATIENCE_MIN_S,
    FetchObserver,
    PrefixFetched,
    PrefixFetcher,
    PrefixOffer,
)
from services.transfer.lease import LOANS_MAX
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import Arrived, KvSource
from services.wire.generated import worker_pb2
from tests.support.in_process_engine import geometry
from tests.support.in_process_workers import DecodeWorker, KvSide, Pair, PrefillWorker, running_pair
from tests.unit.decode.test_disaggregated_pair import Session, alone, sequence

PREFIX = [(7 * n) % 31 for n in range(42)]  # ten blocks of four tokens and two more
PROMPT = [*PREFIX, 1, 2, 3]


class Cluster:
    """A pair whose workers can be warmed, and asked to compute PROMPT with a fetch of what is warm."""

    def __init__(self, pair: Pair, session: Session) -> None:
        self.pair, self.session = pair, session
        self.prefill, self.decode = pair.prefill.kv, pair.decode.kv

    def source(self, worker: KvSide, **changes: object) -> worker_pb2.KvSource:
        if worker is self.prefill:
            return worker_pb2.KvSource(
                **{"worker_id": "p", "address": self.pair.prefill_address, "epoch": 11, **changes}  # type: ignore[arg-type]
            )
        return worker_pb2.KvSource(
            **{"worker_id": "d", "address": self.pair.decode_address, "epoch": 22, **changes}  # type: ignore[arg-type]
        )

    async def warm(self, worker: KvSide, prompt: list[int] = PREFIX) -> None:
        """Let a worker compute `prompt`, which then is in its cache."""
        if worker is self.prefill:
            await self.pair.run_prefill(sequence("warm", prompt), expect_pull=False)
        else:
            await self.session.submit(sequence("warm", prompt, max_tokens=1))
            await self.session.tokens("warm")
        self.prefill.computed_tokens = self.decode.computed_tokens = 0

    def wanted(
        self, source: worker_pb2.KvSource, name: str = "r", tokens: int = 40, **params: object
    ) -> worker_pb2.Sequence:
        one = sequence(name, PROMPT, **params)
        one.prefix.CopyFrom(worker_pb2.PrefixSource(worker=source, tokens=tokens))
        return one

    async def prefill_only(self, one: worker_pb2.Sequence) -> worker_pb2.PrefillReply:
        return await self.pair.run_prefill(one, expect_pull=False)

    async def decode_alone(self, one: worker_pb2.Sequence) -> list[int]:
        await self.session.submit(one)
        return await self.session.tokens(one.request_id)


@asynccontextmanager
async def running(
    prefill: PrefillWorker | None = None, decode: DecodeWorker | None = None
) -> AsyncIterator[Cluster]:
    """Whatever happens in it: at the end nothing is held, and the books are right."""
    async with running_pair(prefill, decode) as pair:
        session = Session(pair)
        yield Cluster(pair, session)
        await session.close()
        await pair.idle()


def label(fetched: PrefixFetched) -> str:
    assert fetched.error is not None
    return facts(fetched.error).label


async def until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.002)


class TestWellEnded:
    async def test_a_prefill_worker_fetches_the_last_turn_from_the_decode_worker(self) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        async with running() as cluster:
            await cluster.warm(cluster.decode)
            reply = await cluster.prefill_only(cluster.wanted(cluster.source(cluster.decode)))
            assert reply.firsts[0].token == expected[0]
            assert (reply.cached_tokens, reply.fetched_tokens) == (0, 40)
            assert cluster.prefill.computed_tokens == 5
            (fetched,) = cluster.prefill.fetched
            assert (fetched.bytes, fetched.error) == (10 * cluster.prefill.memory.block_bytes, None)

    async def test_what_was_fetched_is_cached_for_the_next_request(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.decode)
            one = cluster.wanted(cluster.source(cluster.decode))
            await cluster.prefill_only(one)
            again = await cluster.prefill_only(cluster.wanted(cluster.source(cluster.decode), "again"))
            assert (again.cached_tokens, again.fetched_tokens) == (44, 0)
            assert len(cluster.prefill.fetched) == 1

    async def test_the_decode_worker_pulls_only_what_it_lacks_from_one_that_fetched_from_it(self) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        async with running() as cluster:
            await cluster.warm(cluster.decode)
            one = cluster.wanted(cluster.source(cluster.decode))
            prefill = cluster.pair.run_prefill(one)
            await cluster.session.submit(one, cluster.source(cluster.prefill))
            reply = await prefill
            assert [reply.firsts[0].token, *await cluster.session.tokens()] == expected
            (received,) = cluster.pair.decode.received
            assert received.bytes == 2 * cluster.decode.memory.block_bytes
            assert (cluster.prefill.computed_tokens, cluster.decode.computed_tokens) == (5, 0)

    async def test_a_decode_worker_alone_fetches_from_a_prefill_worker(self) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            await cluster.session.submit(cluster.wanted(cluster.source(cluster.prefill)))
            events = cluster.session.events["r"]
            assert (await events.get()).HasField("reserved")
            started = (await events.get()).started
            assert (started.cached_tokens, started.fetched_tokens) == (0, 40)
            assert await cluster.session.tokens() == expected
            assert cluster.decode.computed_tokens == 5

    async def test_only_what_the_reader_lacks_travels(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            await cluster.warm(cluster.decode, PREFIX[:18])
            await cluster.decode_alone(cluster.wanted(cluster.source(cluster.prefill)))
            (fetched,) = cluster.decode.fetched
            assert fetched.bytes == 6 * cluster.decode.memory.block_bytes

    async def test_a_draining_worker_lends(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            cluster.pair.prefill.incarnation.draining = True
            await cluster.decode_alone(cluster.wanted(cluster.source(cluster.prefill)))
            assert cluster.decode.fetched[0].tokens == 40

    @pytest.mark.parametrize(("theirs", "ours"), [(4, 8), (8, 4), (2, 16), (16, 1)])
    async def test_blocks_of_another_size_are_cut_anew(self, theirs: int, ours: int) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        workers = PrefillWorker(block_size=theirs), DecodeWorker(block_size=ours)
        async with running(*workers) as cluster:
            await cluster.warm(cluster.prefill)
            one = cluster.wanted(cluster.source(cluster.prefill))
            assert await cluster.decode_alone(one) == expected
            wanted = 40 // ours * ours
            assert cluster.decode.fetched[0].tokens == wanted // theirs * theirs

    async def test_many_fetches_at_once_end_well(self) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            names = [f"r{n}" for n in range(5)]
            for name in names:
                await cluster.session.submit(cluster.wanted(cluster.source(cluster.prefill), name))
            answers = [await cluster.session.tokens(name) for name in names]
            assert answers == [expected] * 5


class TestBroken:
    """The sequence goes on with what has landed, and its answer is right."""

    @pytest.mark.parametrize(
        ("changes", "code"),
        [({"epoch": 5}, "kv_source_lost"), ({"address": "127.0.0.1:9"}, "kv_link_lost")],
    )
    async def test_a_source_that_restarted_or_died_costs_only_time(
        self, changes: dict[str, object], code: str
    ) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            one = cluster.wanted(cluster.source(cluster.prefill, **changes))
            assert await cluster.decode_alone(one) == expected
            (fetched,) = cluster.decode.fetched
            assert (fetched.tokens, label(fetched)) == (0, code)
            assert cluster.decode.computed_tokens == len(PROMPT)
            assert cluster.pair.decode.failures == []

    async def test_a_prefix_that_was_evicted_is_computed(self) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        async with running() as cluster:
            one = cluster.wanted(cluster.source(cluster.decode))
            assert (await cluster.prefill_only(one)).firsts[0].token == expected[0]
            assert label(cluster.prefill.fetched[0]) == "kv_source_lost"

    async def test_a_tenant_does_not_fetch_what_another_has_cached(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.decode)
            one = cluster.wanted(cluster.source(cluster.decode))
            one.salt = "another tenant"
            assert (await cluster.prefill_only(one)).fetched_tokens == 0

    async def test_workers_that_differ_do_not_lend(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.decode)
            other = Compatibility(model="other", revision="1", layout="other")
            cluster.decode._server._compatibility = other
            reply = await cluster.prefill_only(cluster.wanted(cluster.source(cluster.decode)))
            assert reply.fetched_tokens == 0
            assert label(cluster.prefill.fetched[0]) == "incompatible"

    async def test_what_landed_before_the_break_is_kept_and_the_rest_computed(self) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            server, memory = cluster.prefill._server, cluster.prefill.memory
            server._blocks_per_chunk = 1
            read, reads = memory.read, []

            def reuse_after_three(blocks: list[int]) -> bytes:
                reads.extend(blocks)
                if len(reads) == 4:
                    memory._generations[blocks[0]] += 1  # as if the engine had handed it out
                return read(blocks)

            memory.read = reuse_after_three  # type: ignore[method-assign, assignment]
            one = cluster.wanted(cluster.source(cluster.prefill))
            assert await cluster.decode_alone(one) == expected
            (fetched,) = cluster.decode.fetched
            assert (fetched.tokens, label(fetched)) == (12, "kv_stale")
            assert cluster.decode.computed_tokens == len(PROMPT) - 12
            assert cluster.pair.prefill.lease_ends[-1] == "stale"

    async def test_a_slow_source_is_waited_for_as_long_as_computing_would_take(self) -> None:
        expected = await alone(sequence(prompt=PROMPT))
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            cluster.decode.ms_per_token = 15.0  # 40 tokens: 0.6 s
            cluster.prefill.engine.paused = True
            started = asyncio.get_running_loop().time()
            one = cluster.wanted(cluster.source(cluster.prefill))
            assert await cluster.decode_alone(one) == expected
            assert 0.6 <= asyncio.get_running_loop().time() - started < 2.0
            assert label(cluster.decode.fetched[0]) == "deadline_exceeded"
            cluster.prefill.engine.resume()


class TestCancelled:
    async def test_a_prefill_cancelled_in_its_fetch_frees_both_workers(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.decode)
            cluster.decode.engine.paused = True
            call = cluster.pair.run_prefill(cluster.wanted(cluster.source(cluster.decode)), expect_pull=False)
            await until(lambda: cluster.decode.leases.open_leases)
            call.cancel()
            await until(lambda: cluster.prefill.engine.idle.is_set())
            cluster.decode.engine.resume()

    async def test_a_decode_sequence_cancelled_in_its_fetch_frees_both_workers(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            cluster.prefill.engine.paused = True
            await cluster.session.submit(cluster.wanted(cluster.source(cluster.prefill)))
            await until(lambda: cluster.prefill.leases.open_leases)
            await cluster.session.cancel("r")
            await until(lambda: cluster.decode.engine.idle.is_set())
            cluster.prefill.engine.resume()

    async def test_no_block_is_given_up_while_a_cancelled_fetch_may_still_write(self) -> None:
        transport = SlowToEnd()
        async with running() as cluster:
            worker = cluster.decode
            worker.fetcher._transport = transport
            await cluster.session.submit(cluster.wanted(cluster.source(cluster.prefill)))
            await until(lambda: transport.lends)
            await cluster.session.cancel("r")
            await asyncio.sleep(0.05)
            assert worker.engine.sequences == 1, "the blocks may be reused under the fetch"
            transport.written.set()
            await until(lambda: worker.engine.idle.is_set())


class TestLoans:
    def reader(self, cluster: Cluster) -> tuple[KvSide, KvSource]:
        return cluster.decode, KvSource("p", cluster.pair.prefill_address, 11)

    async def test_more_loans_than_the_bound_are_refused(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            reader, source = self.reader(cluster)
            for n in range(LOANS_MAX):
                assert await reader.transport.lend(source, f"{n}/0/prefix", PREFIX, "") == 40
            await cluster.decode_alone(cluster.wanted(cluster.source(cluster.prefill)))
            assert label(reader.fetched[0]) == "overloaded"
            for n in range(LOANS_MAX):
                assert await reader.transport.release(source, f"{n}/0/prefix")

    async def test_a_loan_is_asked_for_once(self) -> None:
        async with running() as cluster:
            await cluster.warm(cluster.prefill)
            reader, source = self.reader(cluster)
            await reader.transport.lend(source, "r/0/prefix", PREFIX, "")
            await cluster.decode_alone(cluster.wanted(cluster.source(cluster.prefill)))
            assert label(reader.fetched[0]) == "bad_request"


class SlowToEnd:
    """A transport whose pulls bring nothing, and go on writing for a while when they are closed."""

    def __init__(self, error: DiptychError | None = None) -> None:
        self._error = error
        self.written = asyncio.Event()
        self.lends = 0
        self.abandoned: list[str] = []

    async def lend(self, source: KvSource, transfer_id: str, token_ids: Sequence[int], salt: str) -> int:
        self.lends += 1
        if self._error:
            raise self._error
        return len(token_ids)

    async def pull(
        self, source: KvSource, transfer_id: str, destination: Destination, first_token: int
    ) -> AsyncGenerator[Arrived, None]:
        try:
            yield Arrived(first_token, 4, 16, True)
            yield Arrived(first_token + 4, 4, 16, False)
            await asyncio.sleep(60)
        finally:
            await self.written.wait()

    async def release(self, source: KvSource, transfer_id: str) -> bool:
        return True

    def abandon(self, source: KvSource, transfer_id: str) -> None:
        self.abandoned.append(transfer_id)

    async def close(self) -> None:
        pass


class Fetching:
    def __init__(self, transport: SlowToEnd, ms_per_token: float = 0.0) -> None:
        self.clock = ManualClock()
        self.landed: list[tuple[int, int]] = []
        self.ended: list[PrefixFetched] = []
        shape = geometry(16)
        memory = PoolMemory(shape, memoryview(bytearray(shape.shared_bytes)))
        observer = FetchObserver(
            landed=lambda seq_id, tokens, proven: self.landed.append((tokens, proven)),
            ended=lambda seq_id, fetched: self.ended.append(fetched),
            broke=lambda error: None,
            compute_ms=lambda tokens, start: tokens * ms_per_token,
        )
        self.fetcher = PrefixFetcher(transport, memory, self.clock, observer)

    def start(self, seq_id: str = "r/0", address: str = "here:1") -> None:
        offer = PrefixOffer(seq_id, KvSource("p", address, 1), PROMPT, "")
        self.fetcher.start(offer, list(range(10)), 8, 40, done=lambda fetched: None)


class TestFetcher:
    async def test_a_stopped_fetch_gives_the_blocks_up_only_when_nothing_writes_to_them(self) -> None:
        transport, dropped = SlowToEnd(), []
        fetching = Fetching(transport)
        fetching.start()
        await until(lambda: len(fetching.landed) == 2)
        for _ in range(2):  # a second stop changes nothing
            fetching.fetcher.stop("r/0", lambda: dropped.append("r/0"))
            await asyncio.sleep(0.02)
        assert dropped == []
        transport.written.set()
        await until(lambda: dropped)
        assert (dropped, fetching.ended, transport.abandoned) == (["r/0"], [], ["r/0/prefix"])

    async def test_a_fetch_stopped_when_its_patience_is_over_ends_in_its_own_time(self) -> None:
        transport, dropped = SlowToEnd(), []
        fetching = Fetching(transport, ms_per_token=1.0)
        fetching.start()
        await asyncio.sleep(PATIENCE_MIN_S + 0.1)
        fetching.fetcher.stop("r/0", lambda: dropped.append("r/0"))
        await asyncio.sleep(0.05)
        assert dropped == [], "the blocks were given up while something wrote to them"
        transport.written.set()
        await until(lambda: dropped)

    async def test_stopping_what_fetches_nothing_gives_up_at_once(self) -> None:
        dropped: list[str] = []
        Fetching(SlowToEnd()).fetcher.stop("r/0", lambda: dropped.append("r/0"))
        assert dropped == ["r/0"]

    async def test_a_fetch_stopped_before_its_first_turn_gives_up_too(self) -> None:
        fetching, dropped = Fetching(SlowToEnd()), []
        fetching.start()
        fetching.fetcher.stop("r/0", lambda: dropped.append("r/0"))
        await until(lambda: dropped)

    async def test_only_what_was_proven_counts_as_fetched(self) -> None:
        transport = SlowToEnd()
        transport.written.set()
        fetching = Fetching(transport, ms_per_token=1.0)  # 32 ms; the least patience is half a second
        fetching.start()
        await until(lambda: fetching.ended)
        assert fetching.landed == [(12, 12), (16, 12)]
        assert (fetching.ended[0].tokens, label(fetching.ended[0])) == (4, "deadline_exceeded")

    async def test_a_source_that_does_not_answer_is_left_alone_for_a_while(self) -> None:
        transport = SlowToEnd(KvLinkLost("nobody is there"))
        fetching = Fetching(transport)
        for turn, (pause_s, lends) in enumerate([(0.0, 1), (AVOID_S / 2, 1), (AVOID_S, 2)]):
            fetching.clock.advance(pause_s)
            fetching.start(f"r/{turn}")
            await until(lambda turn=turn: len(fetching.ended) > turn)
            assert transport.lends == lends
        fetching.start("other", address="there:1")
        await until(lambda: len(fetching.ended) == 4)
        assert transport.lends == 3

    async def test_a_source_that_merely_lost_the_prefix_is_asked_again(self) -> None:
        transport = SlowToEnd(KvSourceLost("evicted"))
        fetching = Fetching(transport)
        for turn in range(2):
            fetching.start(f"r/{turn}")
            await until(lambda turn=turn: len(fetching.ended) > turn)
        assert transport.lends == 2
