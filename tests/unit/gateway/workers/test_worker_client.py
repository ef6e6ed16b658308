"""What both worker clients promise: the in-memory one, and the gRPC one against a real server."""

import asyncio
from contextlib import aclosing, asynccontextmanager

import pytest

from services.core.child_tasks import ChildTasks
from services.core.errors import BadRequest, EngineFailed, KvSourceLost, Overloaded, WorkerLost
from services.core.sampling import SamplingParams
from services.gateway.path.inbox import Inbox
from services.gateway.workers.grpc_worker_client import GrpcWorkerClient
from services.gateway.workers.memory_worker_client import Fault, MemoryWorkerClient
from services.gateway.workers.worker_client import OutputToken, Sequence, Started
from tests.unit.gateway.in_memory_cluster import until
from tests.unit.gateway.scripted_worker_server import ScriptedWorkerServer, report

ANSWER = [11, 12, 13, 14, 15]


def sequence(
    request_id: str = "r",
    *,
    outputs: int = 0,
    max_tokens: int = 5,
    ends: tuple[int, ...] = (),
    choices: tuple[int, ...] = (0,),
):
    return Sequence(
        request_id=request_id,
        attempt=1,
        prompt_ids=[1, 2],
        output_ids=ANSWER[:outputs],
        sampling=SamplingParams(max_tokens=max_tokens, end_token_ids=ends, seed=2**63 - 1),
        choices=choices,
    )


@asynccontextmanager
async def memory_cluster():
    client = MemoryWorkerClient(lambda prompt: ANSWER)
    yield client, client, "memory"
    await client.close()


@asynccontextmanager
async def grpc_cluster():
    behind, client = MemoryWorkerClient(lambda prompt: ANSWER), GrpcWorkerClient()
    server = ScriptedWorkerServer(behind)
    await server.start()
    yield client, behind, server.address
    await client.close()
    await server.stop()


async def decoded(client, *arguments):
    """The events of one call as a generator; closing it cancels the call."""
    arrived = Inbox()
    async with ChildTasks() as tasks:
        call = tasks.start(client.decode(*arguments, arrived.put))
        call.add_done_callback(arrived.put)
        while True:
            for event in await arrived.take():
                if event is call:
                    call.result()
                    return
                yield event


async def collect(events) -> list:
    async with aclosing(events):
        return [event async for event in events]


@pytest.fixture(params=[memory_cluster, grpc_cluster], ids=["memory", "grpc"])
async def cluster(request):
    async with request.param() as (client, behind, address):
        yield client, behind, report("w", "both", address=address)


class TestWorkerClient:
    async def test_prefill_gives_the_first_token(self, cluster) -> None:
        client, _, worker = cluster
        result = await client.prefill(worker, sequence(), expect_pull=True)
        assert result.firsts[0] == OutputToken(0, 11, None)

    async def test_prefill_of_a_resume_gives_the_token_after_the_delivered_ones(self, cluster) -> None:
        client, _, worker = cluster
        result = await client.prefill(worker, sequence(outputs=2), expect_pull=True)
        assert result.firsts[0] == OutputToken(2, 13, None)

    async def test_a_prefill_that_ends_the_answer_says_why(self, cluster) -> None:
        client, _, worker = cluster
        stopped = await client.prefill(worker, sequence(ends=(11,)), expect_pull=False)
        cut = await client.prefill(worker, sequence(max_tokens=1), expect_pull=False)
        assert (stopped.firsts[0].finish, cut.firsts[0].finish) == ("stop", "length")

    async def test_prefill_gives_a_first_token_of_each_choice(self, cluster) -> None:
        client, _, worker = cluster
        result = await client.prefill(worker, sequence(choices=(1, 3)), expect_pull=True)
        assert result.firsts == (OutputToken(0, 12, None, 1), OutputToken(0, 14, None, 3))

    async def test_decode_ends_when_every_choice_has_ended(self, cluster) -> None:
        client, behind, worker = cluster
        _, *tokens = await collect(decoded(client, worker, sequence(choices=(0, 2), ends=(15,)), None))
        assert [token.token for token in tokens if token.choice == 0] == ANSWER
        assert [token.token for token in tokens if token.choice == 2] == [13, 14, 15]
        assert [token.finish for token in tokens if token.finish] == ["stop", "stop"]
        await until(lambda: behind.running == [])
        assert behind.cancelled == []

    async def test_an_ended_choice_ends_alone(self, cluster) -> None:
        client, behind, worker = cluster
        behind.script("w", "decode", hanging := Fault(None, after_tokens=1))
        one = sequence(choices=(0, 1, 2))
        async with aclosing(decoded(client, worker, one, None)) as events:
            for _ in range(4):  # Started, and one token of each
                await anext(events)
            client.end_choice(worker, one, 1)
            await until(lambda: [choice for _, choice in behind.ended_choices] == [1])
            hanging.end.set()
            rest = [await anext(events) for _ in range(8)]
        assert {token.choice for token in rest} == {0, 2}

    async def test_ending_a_choice_of_a_call_that_is_over_is_harmless(self, cluster) -> None:
        client, behind, worker = cluster
        await collect(decoded(client, worker, sequence(choices=(0, 1)), None))
        client.end_choice(worker, sequence(choices=(0, 1)), 1)
        assert len(await collect(decoded(client, worker, sequence("next"), None))) == 6
        assert behind.ended_choices == []

    async def test_decode_alone_gives_started_and_all_tokens(self, cluster) -> None:
        client, _, worker = cluster
        started, *tokens = await collect(decoded(client, worker, sequence(), None))
        assert isinstance(started, Started)
        assert [token.token for token in tokens] == ANSWER
        assert [token.finish for token in tokens] == [None] * 4 + ["length"]

    async def test_decode_from_a_source_starts_at_the_second_token(self, cluster) -> None:
        client, behind, worker = cluster
        source = report("p", "prefill", epoch=77)
        _, *tokens = await collect(decoded(client, worker, sequence(), source))
        assert [(token.index, token.token) for token in tokens] == list(enumerate(ANSWER))[1:]
        assert behind.calls[0].source == source.key

    async def test_the_worker_gets_the_sequence_unchanged(self, cluster) -> None:
        client, behind, worker = cluster
        await client.prefill(worker, sequence(outputs=3, ends=(2, 3)), expect_pull=True)
        await collect(decoded(client, worker, sequence("other", outputs=1), None))
        assert behind.calls[0].sequence == sequence(outputs=3, ends=(2, 3))
        assert behind.calls[1].sequence == sequence("other", outputs=1)

    @pytest.mark.parametrize("error", [Overloaded("full"), EngineFailed("boom"), BadRequest("no")])
    async def test_a_refused_prefill_raises_the_worker_s_error(self, cluster, error) -> None:
        client, behind, worker = cluster
        behind.script("w", "prefill", Fault(error))
        with pytest.raises(type(error), match=error.message):
            await client.prefill(worker, sequence(), expect_pull=True)

    @pytest.mark.parametrize("tokens", [0, 2])
    async def test_a_failing_decode_raises_the_worker_s_error_after_its_tokens(self, cluster, tokens) -> None:
        client, behind, worker = cluster
        behind.script("w", "decode", Fault(KvSourceLost("gone"), after_tokens=tokens))
        events = decoded(client, worker, sequence(), None)
        received = [await anext(events) for _ in range(tokens + (tokens > 0))]
        assert [event.token for event in received if isinstance(event, OutputToken)] == ANSWER[:tokens]
        with pytest.raises(KvSourceLost, match="gone"):
            await anext(events)

    async def test_one_failing_sequence_leaves_the_others_alone(self, cluster) -> None:
        client, behind, worker = cluster
        behind.script("w", "decode", Fault(EngineFailed("mine")))
        first = decoded(client, worker, sequence("first"), None)
        with pytest.raises(EngineFailed):
            await anext(first)
        assert len(await collect(decoded(client, worker, sequence("second"), None))) == 6

    async def test_many_sequences_do_not_mix(self, cluster) -> None:
        client, _, worker = cluster
        runs = [collect(decoded(client, worker, sequence(f"r{n}", max_tokens=n), None)) for n in range(1, 20)]
        results = await asyncio.gather(*runs)
        assert [len(result) - 1 for result in results] == list(range(1, 20))

    async def test_cancelling_a_prefill_cancels_it_on_the_worker(self, cluster) -> None:
        client, behind, worker = cluster
        behind.script("w", "prefill", Fault(None))
        call = asyncio.create_task(client.prefill(worker, sequence(), expect_pull=True))
        await until(lambda: behind.running)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: behind.cancelled and not behind.running)

    async def test_closing_a_decode_cancels_it_on_the_worker(self, cluster) -> None:
        client, behind, worker = cluster
        behind.script("w", "decode", Fault(None, after_tokens=2))
        async with aclosing(decoded(client, worker, sequence(), None)) as events:
            assert isinstance(await anext(events), Started)
            assert await anext(events) == OutputToken(0, 11)
            assert behind.running
        await until(lambda: behind.cancelled and not behind.running)

    async def test_a_finished_decode_is_not_cancelled(self, cluster) -> None:
        client, behind, worker = cluster
        await collect(decoded(client, worker, sequence("first"), None))
        await collect(decoded(client, worker, sequence("second"), None))  # any cancel would come before
        assert behind.cancelled == []

    async def test_calls_to_a_worker_that_left_end_as_worker_lost(self, cluster) -> None:
        client, behind, worker = cluster
        behind.script("w", "prefill", Fault(None))
        behind.script("w", "decode", Fault(None, after_tokens=1))
        prefill = asyncio.create_task(client.prefill(worker, sequence("p"), expect_pull=True))
        decode = asyncio.create_task(collect(decoded(client, worker, sequence("d"), None)))
        await until(lambda: len(behind.running) == 2)
        await client.keep_only([])
        results = await asyncio.gather(prefill, decode, return_exceptions=True)
        assert [type(result) for result in results] == [WorkerLost, WorkerLost]
        await until(lambda: not behind.running)

    async def test_a_worker_that_stays_keeps_its_calls(self, cluster) -> None:
        client, behind, worker = cluster
        behind.script("w", "decode", Fault(None, after_tokens=1))
        decode = decoded(client, worker, sequence(), None)
        await anext(decode)
        await client.keep_only([worker])
        assert await anext(decode) == OutputToken(0, 11)
        await decode.aclose()
        assert len(await collect(decoded(client, worker, sequence("again"), None))) == 6


class TestGrpcSession:
    async def test_all_sequences_of_a_worker_share_one_stream(self) -> None:
        client, server = (
            GrpcWorkerClient(),
            ScriptedWorkerServer(MemoryWorkerClient(lambda prompt: ANSWER)),
        )
        await server.start()
        worker = report("w", "both", address=server.address)
        await asyncio.gather(*[collect(decoded(client, worker, sequence(str(n)), None)) for n in range(5)])
        assert server.sessions_opened == 1
        await client.close()
        await server.stop()

    async def test_a_dead_server_fails_its_sequences_as_worker_lost(self) -> None:
        behind, client = MemoryWorkerClient(lambda prompt: ANSWER), GrpcWorkerClient()
        server = ScriptedWorkerServer(behind)
        await server.start()
        worker = report("w", "both", address=server.address)
        behind.script("w", "decode", Fault(None, after_tokens=1), Fault(None))
        runs = [
            asyncio.create_task(collect(decoded(client, worker, sequence(str(n)), None))) for n in range(2)
        ]
        await until(lambda: len(behind.running) == 2)
        await server.stop()
        results = await asyncio.gather(*runs, return_exceptions=True)
        assert [type(result) for result in results] == [WorkerLost, WorkerLost]
        with pytest.raises(WorkerLost):
            await client.prefill(worker, sequence(), expect_pull=True)
        await client.close()

    async def test_a_broken_stream_is_replaced_at_the_next_use(self) -> None:
        behind, client = MemoryWorkerClient(lambda prompt: ANSWER), GrpcWorkerClient()
        server = ScriptedWorkerServer(behind)
        await server.start()
        worker = report("w", "both", address=server.address)
        await collect(decoded(client, worker, sequence("before"), None))
        client._sessions[worker.key]._call.cancel()  # what a reset connection looks like
        await until(lambda: client._sessions[worker.key].over)
        assert len(await collect(decoded(client, worker, sequence("after"), None))) == 6
        assert server.sessions_opened == 2
        await client.close()
        await server.stop()
