"""Prefill and decode service together: right tokens through the transfer, and nothing held afterwards."""

import asyncio

import grpc.aio
import pytest

from services.core.errors import (
    BadRequest,
    DiptychError,
    Draining,
    EngineStalled,
    Overloaded,
    PullerLost,
    RoleChanged,
    WorkerLost,
)
from services.core.sampling import SamplingParams
from services.decode import service as service_module
from services.decode.sequence import DecodeSequence
from services.engine.messages import Admitted, Revoked
from services.transfer.destination import Destination
from services.transfer.protocol import FirstToken, KvSource
from services.wire.channel import from_rpc_error
from services.wire.convert import sampling_to_wire
from services.wire.generated import worker_pb2
from tests.support.in_process_engine import InProcessEngine
from tests.support.in_process_workers import (
    BOUNDS,
    DecodeWorker,
    Pair,
    PrefillWorker,
    running_pair,
    until,
)

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def sequence(
    name: str = "r",
    prompt: list[int] = PROMPT,
    outputs: tuple[int, ...] = (),
    choices: tuple[int, ...] = (),
    **params: object,
) -> worker_pb2.Sequence:
    return worker_pb2.Sequence(
        request_id=name,
        attempt=0,
        prompt_ids=prompt,
        output_ids=outputs,
        sampling=sampling_to_wire(SamplingParams(**{"max_tokens": 8, **params})),  # type: ignore[arg-type]
        choice_ids=choices,
    )


def submit(one: worker_pb2.Sequence, source: worker_pb2.KvSource | None) -> worker_pb2.DecodeCommand:
    return worker_pb2.DecodeCommand(submit=worker_pb2.DecodeSubmit(sequence=one, epoch=22, source=source))


class Session:
    """One gateway's stream: writes commands, sorts events by request."""

    def __init__(self, pair: Pair) -> None:
        self.call = pair.session()
        self.events: dict[str, asyncio.Queue[worker_pb2.DecodeEvent]] = {}
        self.batches = 0
        self._reading = asyncio.create_task(self._read())

    async def submit(self, one: worker_pb2.Sequence, source: worker_pb2.KvSource | None = None) -> None:
        self.events.setdefault(one.request_id, asyncio.Queue())
        await self.call.write(submit(one, source))

    async def cancel(self, name: str, *choices: int) -> None:
        cancel = worker_pb2.DecodeCancel(request_id=name, attempt=0, choice_ids=choices)
        await self.call.write(worker_pb2.DecodeCommand(cancel=cancel))

    async def tokens(self, name: str = "r") -> list[int]:
        """Until the finish."""
        found: list[int] = []
        while True:
            event = await asyncio.wait_for(self.events[name].get(), 5)
            assert not event.HasField("failure"), event.failure
            if event.HasField("token"):
                found.append(event.token.token)
                if event.token.finish:
                    return found

    async def failure(self, name: str = "r") -> str:
        while True:
            event = await asyncio.wait_for(self.events[name].get(), 5)
            if event.HasField("failure"):
                return str(event.failure.code)

    async def close(self) -> None:
        self._reading.cancel()
        self.call.cancel()

    async def _read(self) -> None:
        async for batch in self.call:
            self.batches += 1
            for event in batch.events:
                self.events[event.request_id].put_nowait(event)


async def alone(one: worker_pb2.Sequence) -> list[int]:
    """What a decode worker by itself answers."""
    async with running_pair() as pair:
        session = Session(pair)
        await session.submit(one)
        answer = await session.tokens(one.request_id)
        await session.close()
        return answer


async def test_the_answer_is_that_of_one_worker_alone() -> None:
    expected = await alone(sequence())
    async with running_pair() as pair:
        session = Session(pair)
        prefill = pair.run_prefill(sequence())
        await session.submit(sequence(), pair.source())
        reply = await prefill
        assert [reply.firsts[0].token, *await session.tokens()] == expected
        received = pair.decode.received
        assert received[0].bytes == 3 * pair.decode.engine.geometry.block_bytes
        assert pair.decode.engine.engine.take_report().gauges.prompt_tokens == len(PROMPT)
        await session.close()
        await pair.idle()


@pytest.mark.parametrize(("theirs", "ours"), [(4, 8), (8, 4), (2, 16), (16, 1)])
async def test_workers_with_different_block_sizes_give_the_same_answer(theirs: int, ours: int) -> None:
    """Two turns: in the second both workers reuse what they have, each in blocks of its own size."""
    first = await alone(sequence())
    turn = PROMPT + first
    second = await alone(sequence(prompt=turn))
    workers = PrefillWorker(block_size=theirs), DecodeWorker(block_size=ours)
    async with running_pair(*workers) as pair:
        session = Session(pair)
        for name, prompt, expected in (("one", PROMPT, first), ("two", turn, second)):
            prefill = pair.run_prefill(sequence(name, prompt))
            await session.submit(sequence(name, prompt), pair.source())
            reply = await prefill
            assert [reply.firsts[0].token, *await session.tokens(name)] == expected
        assert (reply.cached_tokens > 0) == (theirs <= len(PROMPT))
        await session.close()
        await pair.idle()


async def test_either_side_may_come_first() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        await session.submit(sequence("pull-first"), pair.source())
        await asyncio.sleep(0.05)
        await pair.run_prefill(sequence("pull-first"))
        prefill = pair.run_prefill(sequence("run-first"))
        await asyncio.sleep(0.05)
        assert pair.prefill.engine.sequences <= 1, "blocks were taken before the pull had come"
        await session.submit(sequence("run-first"), pair.source())
        await prefill
        assert await session.tokens("pull-first") == await session.tokens("run-first")
        await session.close()
        await pair.idle()


async def test_a_resumed_answer_goes_on_at_its_index() -> None:
    expected = await alone(sequence())
    async with running_pair() as pair:
        session = Session(pair)
        resumed = sequence(outputs=tuple(expected[:3]))
        prefill = pair.run_prefill(resumed)
        await session.submit(resumed, pair.source())
        reply = await prefill
        assert reply.firsts[0].index == 3
        assert [reply.firsts[0].token, *await session.tokens()] == expected[3:]
        await session.close()


async def test_the_second_turn_pulls_only_what_the_decode_worker_lacks() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        for name in ("first", "second"):
            prefill = pair.run_prefill(sequence(name))
            await session.submit(sequence(name), pair.source())
            await prefill
            await session.tokens(name)
        block = pair.decode.engine.geometry.block_bytes
        assert [received.bytes for received in pair.decode.received] == [3 * block, 1 * block]
        await session.close()
        await pair.idle()


async def test_an_answer_that_ends_at_its_first_token_frees_the_decode_worker() -> None:
    first = (await alone(sequence()))[0]
    async with running_pair() as pair:
        session = Session(pair)
        one = sequence(end_token_ids=(first,))
        prefill = pair.run_prefill(one)
        await session.submit(one, pair.source())
        assert (await prefill).firsts[0].finish == worker_pb2.FINISH_REASON_STOP
        await pair.idle()
        await session.close()


async def test_a_prefill_without_a_decode_worker_gives_its_blocks_back_at_once() -> None:
    async with running_pair() as pair:
        reply = await pair.run_prefill(sequence(max_tokens=1), expect_pull=False)
        assert reply.firsts[0].finish == worker_pb2.FINISH_REASON_LENGTH
        await pair.idle()


@pytest.mark.parametrize("paused", [False, True])
async def test_cancelling_both_sides_frees_everything(paused: bool) -> None:
    async with running_pair() as pair:
        session = Session(pair)
        one = sequence(max_tokens=150)
        prefill = pair.run_prefill(one)
        pair.prefill.engine.paused = paused
        await session.submit(one, pair.source())
        await until(lambda: pair.prefill.engine.sequences or prefill.done())
        prefill.cancel()
        await session.cancel("r")
        pair.prefill.engine.resume()
        await pair.idle()
        await session.close()


async def test_a_gateway_that_goes_away_cancels_all_its_sequences() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        for index in range(5):
            await session.submit(sequence(f"r{index}", max_tokens=150))
        await until(lambda: session.batches)
        await session.close()
        await pair.idle()


async def test_a_prefill_that_nobody_pulls_ends_with_an_error() -> None:
    async with running_pair() as pair:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await pair.run_prefill(sequence())
        assert isinstance(from_rpc_error(raised.value, "p"), PullerLost)
        await pair.idle()


async def test_a_pull_without_its_prefill_fails_and_frees_the_reservation() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        await session.submit(sequence(), pair.source())
        assert await session.failure() == "kv_source_lost"
        await pair.idle()
        await session.close()


async def test_a_decode_worker_without_room_refuses_at_once() -> None:
    async with running_pair(decode=DecodeWorker(blocks=2)) as pair:
        session = Session(pair)
        await session.submit(sequence(), pair.source())
        assert await session.failure() == "overloaded"
        await session.close()


async def test_cancels_right_behind_their_submissions_leak_nothing() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        for index in range(100):
            await session.submit(sequence(f"r{index}"), pair.source())
            await session.cancel(f"r{index}")
        await session.submit(sequence("last"))
        await session.tokens("last")
        await pair.idle()
        await session.close()


async def test_a_revocation_before_the_first_turn_of_a_receive_is_answered() -> None:
    async with running_pair() as pair:
        events = []
        one = DecodeSequence(
            BOUNDS.submission(sequence(), "receive"), KvSource("p", pair.prefill_address, 11),
            pair.decode.parts, events.append, on_end=lambda: events.append("end"),
            vocab_size=BOUNDS.vocab_size,
        )  # fmt: skip
        pair.decode.engine.paused = True  # its admission is told by hand, in one turn with the revocation
        one.open()
        one._on_event(Admitted("r/0", [0, 1, 2], 0, 0.0))
        one._on_event(Revoked("r/0"))
        await until(lambda: "end" in events)
        assert events[0] == worker_pb2.DecodeReserved()
        assert [getattr(event, "code", event) for event in events[1:]] == ["overloaded", "end"]


async def test_a_bug_in_a_receive_ends_in_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Destination, *chunk: object) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(Destination, "place", broken)
    async with running_pair() as pair:
        session = Session(pair)
        prefill = pair.run_prefill(sequence())
        await session.submit(sequence(), pair.source())
        assert await session.failure() == "engine_failed"
        prefill.cancel()
        await pair.idle()
        await session.close()


async def test_an_attempt_that_another_session_runs_is_refused() -> None:
    async with running_pair() as pair:
        pair.decode.engine.paused = True
        one, two = Session(pair), Session(pair)
        await one.submit(sequence())
        await until(lambda: pair.decode.engine.sequences)
        await two.submit(sequence())
        assert await two.failure() == "bad_request"
        pair.decode.engine.resume()
        assert len(await one.tokens()) == 8
        await one.close()
        await two.close()


async def test_a_gateway_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_PENDING_EVENTS_MAX", 20)
    async with running_pair() as pair:
        session = service_module.Session(pair.decode.parts, pair.decode.incarnation, BOUNDS)
        session.handle(submit(sequence(max_tokens=100), None))
        await pair.idle()
        with pytest.raises(Overloaded, match="does not read"):
            await session.events()


async def test_an_expired_lease_frees_the_prefill_worker() -> None:
    async with running_pair(prefill=PrefillWorker(lease_ttl_s=0.1)) as pair:
        sweep = asyncio.create_task(pair.prefill.leases.expire_forever())
        pull = pair.decode._transport.pull
        prefill = pair.run_prefill(sequence())
        destination = Destination(pair.decode.parts.memory, range(3), len(PROMPT), held_tokens=0)
        chunks = pull(KvSource("p", pair.prefill_address, 11), "r/0", destination, 0)
        await anext(chunks)
        await prefill
        await chunks.aclose()  # it read, but never confirms
        await pair.idle()
        sweep.cancel()


async def test_a_decode_worker_that_gives_up_ends_the_prefill() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pair.prefill.engine.paused = True
        prefill = pair.run_prefill(sequence())
        await session.submit(sequence(), pair.source())
        await until(lambda: pair.prefill.engine.sequences)
        await session.cancel("r")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await prefill
        assert isinstance(from_rpc_error(raised.value, "p"), Overloaded)
        pair.prefill.engine.resume()
        await pair.idle()
        await session.close()


async def refusal(pair: Pair) -> type[DiptychError]:
    """Of a prefill that nobody needs to pull."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await pair.run_prefill(sequence(), expect_pull=False)
    return type(from_rpc_error(raised.value, "p"))


async def test_another_incarnation_another_role_and_a_draining_worker_refuse() -> None:
    async with running_pair() as pair:
        prefill, decode, session = pair.prefill.incarnation, pair.decode.incarnation, Session(pair)
        prefill.draining = True
        assert await refusal(pair) is Draining
        prefill.draining, prefill.role = False, "decode"
        assert await refusal(pair) is RoleChanged
        decode.role = "prefill"
        await session.submit(sequence())
        assert await session.failure() == "role_changed"
        decode.draining = True
        await session.submit(sequence())
        assert await session.failure() == "draining"
        decode.key = decode.key._replace(epoch=23)
        await session.submit(sequence())
        assert await session.failure() == "worker_lost"
        await session.close()


async def test_kv_of_a_worker_that_drains_or_changed_its_role_is_still_pulled() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        prefill = pair.run_prefill(sequence())
        await until(lambda: pair.prefill.leases.open_leases)
        pair.prefill.incarnation.draining = True
        pair.prefill.incarnation.role = "decode"
        await session.submit(sequence(), pair.source())
        await prefill
        assert len(await session.tokens()) == 7
        await session.close()
        await pair.idle()


async def test_what_is_handed_over_ends_at_once_and_leaves_nothing() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pair.prefill.engine.paused = True  # "receiving" is in the middle of its transfer
        prefill = pair.run_prefill(sequence("receiving"))
        await session.submit(sequence("receiving"), pair.source())
        await until(lambda: pair.prefill.engine.sequences)
        await session.submit(sequence("local", max_tokens=150))
        await until(lambda: not session.events["local"].empty())
        assert pair.decode.service.give_up(Draining("moving")) == 2
        assert pair.prefill.leases.fail_unfinished(Draining("moving")) == 1
        assert {await session.failure("local"), await session.failure("receiving")} == {"draining"}
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await prefill
        assert isinstance(from_rpc_error(raised.value, "p"), Draining)
        pair.prefill.engine.resume()
        await pair.idle()
        await session.close()


async def test_computed_kv_outlives_the_handing_over_of_its_worker() -> None:
    async with running_pair() as pair:
        source = KvSource("p", pair.prefill_address, 11)
        destination = Destination(pair.decode.parts.memory, range(3), len(PROMPT), held_tokens=0)
        pull = pair.decode._transport.pull(source, "r/0", destination, 0)
        prefill = pair.run_prefill(sequence())
        await anext(pull)
        await prefill
        assert pair.prefill.leases.fail_unfinished(Draining("moving")) == 0
        assert [arrived.firsts async for arrived in pull][-1]
        assert await pair.decode._transport.release(source, "r/0")
        await pair.idle()


async def test_a_new_incarnation_ends_all_that_the_old_one_had() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pair.prefill.engine.paused = True
        prefill = pair.run_prefill(sequence("lost"))
        await session.submit(sequence("lost"), pair.source())
        await session.submit(sequence("early"), pair.source())  # its pull waits for a prefill
        await until(lambda: pair.prefill.engine.sequences)
        pair.prefill.leases.fail_all(WorkerLost("another incarnation"))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await prefill
        assert isinstance(from_rpc_error(raised.value, "p"), WorkerLost)
        assert {await session.failure("lost"), await session.failure("early")} == {"kv_source_lost"}
        pair.prefill.engine.resume()
        await pair.idle()
        await session.close()


async def test_an_overdue_engine_gives_its_sequences_up_and_frees_them_when_it_is_back() -> None:
    async with running_pair() as pair:
        session, told = Session(pair), []
        await session.submit(sequence("stream", max_tokens=150))
        await until(lambda: session.batches)
        engine = pair.decode.engine
        watch = asyncio.create_task(engine.watch(overdue_s=0.1, hung_s=60.0, on_overdue=told.append))
        engine.paused = True
        assert await session.failure("stream") == "engine_stalled"
        await session.submit(sequence("new"))
        assert await session.failure("new") == "engine_stalled"
        assert told == [True]
        engine.resume()
        await pair.idle()
        await until(lambda: told == [True, False])
        await session.submit(sequence("again"))
        assert len(await session.tokens("again")) == 8
        watch.cancel()
        await session.close()


async def test_a_prefill_on_an_overdue_engine_goes_elsewhere_but_computed_kv_stays() -> None:
    async with running_pair() as pair:
        source = KvSource("p", pair.prefill_address, 11)
        destination = Destination(pair.decode.parts.memory, range(3), len(PROMPT), held_tokens=0)
        pull = pair.decode._transport.pull(source, "done/0", destination, 0)
        done = pair.run_prefill(sequence("done"))
        await anext(pull)
        await done
        engine = pair.prefill.engine
        engine.paused = True
        stuck = pair.run_prefill(sequence("stuck"), expect_pull=False)
        watch = asyncio.create_task(engine.watch(overdue_s=0.1, hung_s=60.0, on_overdue=lambda on: None))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stuck
        assert isinstance(from_rpc_error(raised.value, "p"), EngineStalled)
        assert [arrived.firsts async for arrived in pull][-1]
        assert await pair.decode._transport.release(source, "done/0")
        engine.resume()
        await pair.idle()
        watch.cancel()


async def test_a_sequence_that_could_break_a_step_is_refused() -> None:
    bad = [
        sequence(prompt=[]),
        sequence(prompt=[50_000]),
        sequence(prompt=[-1]),
        sequence(max_tokens=500),
        sequence(outputs=(1,) * 8),
        sequence(choices=(1, 2, 1)),
        sequence(choices=tuple(range(129))),
    ]
    async with running_pair() as pair:
        for one in bad:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await pair.run_prefill(one, expect_pull=False)
            assert isinstance(from_rpc_error(raised.value, "p"), BadRequest)
        await pair.idle()


async def test_the_death_of_an_engine_reaches_every_sequence_once() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pair.decode.engine.paused = True
        await session.submit(sequence("local"))
        await asyncio.sleep(0.02)
        InProcessEngine._fail_all(pair.decode.engine)
        assert await session.failure("local") == "engine_failed"
        await session.close()


async def test_a_loan_cannot_take_the_name_of_an_attempt() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pair.decode.engine.paused = True
        await session.submit(sequence())
        await until(lambda: pair.decode.engine.sequences == 1)
        with pytest.raises(BadRequest, match="does not name a loan"):
            await pair.prefill.kv.transport.lend(KvSource("d", pair.decode_address, 22), "r/0", PROMPT, "")
        pair.decode.engine.resume()
        assert await session.tokens() == await alone(sequence())
        await session.close()


@pytest.mark.parametrize(
    "firsts",
    [
        (),
        (FirstToken(0, 1, None, choice=3),),
        (FirstToken(0, 50_000, None),),
        (FirstToken(0, -1, None),),
        (FirstToken(5, 1, None),),
        (FirstToken(0, 1, None), FirstToken(0, 2, None)),
    ],
)
async def test_first_tokens_that_the_sequence_cannot_have_end_it_with_an_error(
    firsts: tuple[FirstToken, ...],
) -> None:
    async with running_pair() as pair:
        session = Session(pair)
        prefill = pair.run_prefill(sequence())
        await until(lambda: pair.prefill.leases.knows("r/0"))
        pair.prefill.engine.paused = True
        lease = pair.prefill.leases._leases["r/0"]
        lease.finished = lambda first, at_s: (lease.firsts.extend(firsts), lease._completed(at_s))  # type: ignore[method-assign, assignment]
        pair.prefill.engine.resume()
        await session.submit(sequence(), pair.source())
        assert await session.failure() in ("kv_corrupt", "kv_source_lost")
        prefill.cancel()
        await session.submit(sequence("next"))
        assert await session.tokens("next") == await alone(sequence("next"))
        await session.close()
        await pair.idle()
