"""Several choices of one prompt through a prefill and a decode worker: one transfer, each choice right."""

import asyncio
from collections.abc import Iterable

from services.engine.messages import Report
from services.wire.generated import worker_pb2
from tests.support.in_process_workers import Pair, running_pair, until
from tests.unit.decode.test_disaggregated_pair import PROMPT, Session, sequence

Choices = dict[int, list[int]]
THREE = (0, 1, 2)


def pause_at_the_fork(pair: Pair) -> None:
    """The decode worker stands still when its three choices run."""
    engine = pair.decode.engine

    def pause(report: Report) -> None:
        engine.paused = report.gauges.running == 3

    engine._on_report = pause


async def answers(session: Session, choices: Iterable[int], name: str = "r") -> Choices:
    """The tokens of each choice, until all have a finish."""
    found: Choices = {choice: [] for choice in choices}
    unfinished = set(found)
    while unfinished:
        async with asyncio.timeout(5):
            event = await session.events[name].get()
        assert not event.HasField("failure"), event.failure
        if event.HasField("token") and event.token.choice in found:
            assert event.token.choice in unfinished
            found[event.token.choice].append(event.token.token)
            if event.token.finish:
                unfinished.remove(event.token.choice)
    return found


async def alone(choice: int, **params: object) -> list[int]:
    """What a decode worker by itself answers to this choice."""
    async with running_pair() as pair:
        session = Session(pair)
        await session.submit(sequence(choices=(choice,), **params))  # type: ignore[arg-type]
        found = await answers(session, [choice])
        await session.close()
        return found[choice]


async def both_workers(pair: Pair, session: Session, one: worker_pb2.Sequence) -> worker_pb2.PrefillReply:
    prefill = pair.run_prefill(one)
    await session.submit(one, pair.source())
    return await prefill


async def test_each_choice_is_that_of_one_worker_alone_and_the_kv_travels_once() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        reply = await both_workers(pair, session, sequence(choices=THREE))
        firsts = {first.choice: [first.token] for first in reply.firsts}
        assert sorted(firsts) == [0, 1, 2]
        found = await answers(session, THREE)
        assert {choice: firsts[choice] + found[choice] for choice in THREE} == {
            choice: await alone(choice) for choice in THREE
        }
        (received,) = pair.decode.received
        assert received.bytes == 3 * pair.decode.engine.geometry.block_bytes
        assert pair.decode.engine.engine.take_report().gauges.prompt_tokens == len(PROMPT)
        await session.close()
        await pair.idle()


async def test_choices_that_end_at_their_first_token_are_not_started() -> None:
    ending = (await alone(1))[0]
    async with running_pair() as pair:
        session = Session(pair)
        reply = await both_workers(pair, session, sequence(choices=THREE, end_token_ids=(ending,)))
        assert [bool(first.finish) for first in reply.firsts] == [False, True, False]
        found = await answers(session, (0, 2))
        assert found == {choice: (await alone(choice))[1:] for choice in (0, 2)}
        await session.close()
        await pair.idle()


async def test_choices_that_all_end_at_their_first_token_free_the_decode_worker() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        reply = await both_workers(pair, session, sequence(choices=THREE, max_tokens=1))
        assert all(first.finish == worker_pb2.FINISH_REASON_LENGTH for first in reply.firsts)
        await pair.idle()
        await session.close()


async def test_a_cancelled_choice_frees_its_blocks_and_the_others_go_on() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pause_at_the_fork(pair)
        await both_workers(pair, session, sequence(choices=THREE, max_tokens=50))
        await until(lambda: pair.decode.engine.paused)
        await session.cancel("r", 1)
        await until(lambda: bool(pair.decode.engine._commands))
        pair.decode.engine.resume()
        assert await answers(session, (0, 2)) == {
            choice: (await alone(choice, max_tokens=50))[1:] for choice in (0, 2)
        }
        await session.close()
        await pair.idle()


async def test_cancelling_a_choice_while_the_kv_comes_leaves_it_out() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pair.prefill.engine.paused = True
        prefill = pair.run_prefill(sequence(choices=THREE))
        await session.submit(sequence(choices=THREE), pair.source())
        await until(lambda: pair.prefill.engine.sequences > 0)
        await session.cancel("r", 1)
        await session.submit(sequence("later", max_tokens=1))  # what is behind it has arrived, so it has
        await session.tokens("later")
        pair.prefill.engine.resume()
        await prefill
        assert await answers(session, (0, 2)) == {choice: (await alone(choice))[1:] for choice in (0, 2)}
        await session.close()
        await pair.idle()


async def test_cancelling_every_choice_while_the_kv_comes_ends_the_transfer() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pair.prefill.engine.paused = True
        prefill = pair.run_prefill(sequence(choices=THREE))
        await session.submit(sequence(choices=THREE), pair.source())
        await until(lambda: pair.prefill.engine.sequences > 0)
        for choice in THREE:
            await session.cancel("r", choice)
        pair.prefill.engine.resume()
        await pair.idle()
        prefill.cancel()
        await session.close()


async def test_a_cancel_of_the_whole_sequence_ends_all_choices() -> None:
    async with running_pair() as pair:
        session = Session(pair)
        pause_at_the_fork(pair)
        await both_workers(pair, session, sequence(choices=THREE, max_tokens=150))
        await until(lambda: pair.decode.engine.paused)
        await session.cancel("r")
        await until(lambda: bool(pair.decode.engine._commands))
        pair.decode.engine.resume()
        await pair.idle()
        await session.close()


async def test_a_resumed_choice_goes_on_at_its_index_as_itself() -> None:
    expected = await alone(2)
    async with running_pair() as pair:
        session = Session(pair)
        one = sequence(choices=(2,), outputs=tuple(expected[:3]))
        reply = await both_workers(pair, session, one)
        assert [(first.index, first.choice) for first in reply.firsts] == [(3, 2)]
        assert [reply.firsts[0].token, *(await answers(session, [2]))[2]] == expected[3:]
        await session.close()
