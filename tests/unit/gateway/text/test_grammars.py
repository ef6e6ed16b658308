"""Grammars are tried in a process of their own, which survives whatever they do."""

import asyncio
import json
import os
import signal

import pytest

from services.core.errors import BadRequest, Overloaded
from services.gateway.text.grammar import Asked
from services.gateway.text.grammar_process import PROCESSOR_S, Reply
from services.gateway.text.grammars import Grammars, ProcessTrial

DIGITS = Asked("regex", "[0-9]{3}")
# Each pattern is simple; that a text matches all of them is found out by nobody.
ENDLESS = Asked(
    "schema",
    json.dumps({"allOf": [{"type": "string", "pattern": f"(.*[a-m].{{{n}}})*"} for n in range(5, 30)]}),
)


class CountingTrial:
    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answers = asyncio.Event()

    async def ask(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        await self.answers.wait()
        return Reply(error="no") if asked.text == "bad" else Reply(asked.text)

    async def close(self) -> None:
        pass


@pytest.fixture
async def trial(tokenizer):
    trial = ProcessTrial(tokenizer)
    yield trial
    await trial.close()


async def test_what_hangs_is_refused_and_hurts_nobody_else(trial) -> None:
    chain = "\n".join(f'a{n}: "b" a{n + 1} | "c"' for n in range(2500))
    assert (await trial.ask(DIGITS)).grammar
    pid = trial._child.pid
    assert (await trial.ask(Asked("lark", f'start: a0\n{chain}\na2500: "d"'))).grammar
    assert "takes too long" in (await trial.ask(ENDLESS)).error
    assert "missing" in (await trial.ask(Asked("lark", "start: missing"))).error
    assert (await trial.ask(DIGITS)).grammar
    assert trial._child.pid == pid, "the process was replaced"


async def test_the_event_loop_goes_on_while_a_grammar_is_tried(trial) -> None:
    asking = asyncio.create_task(trial.ask(ENDLESS))
    ticks = 0
    while not asking.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > PROCESSOR_S / 0.05


async def test_a_request_that_is_given_up_leaves_the_next_one_its_own_answer(trial) -> None:
    await trial.ask(DIGITS)
    given_up = asyncio.create_task(trial.ask(ENDLESS))
    await asyncio.sleep(0.05)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert (await trial.ask(DIGITS)).grammar


async def test_a_grammar_is_tried_once_and_its_failure_is_remembered_too() -> None:
    trial = CountingTrial()
    grammars = Grammars(trial)
    good, bad = Asked("lark", "good"), Asked("lark", "bad")
    asking = [asyncio.create_task(grammars.grammar(good, "guided_grammar")) for _ in range(3)]
    await asyncio.sleep(0)
    trial.answers.set()
    assert await asyncio.gather(*asking) == ["good"] * 3
    for _ in range(2):
        with pytest.raises(BadRequest, match="'guided_regex' cannot be followed: no") as caught:
            await grammars.grammar(bad, "guided_regex")
        assert caught.value.param == "guided_regex"
    assert trial.asked == [good, bad]


async def test_a_process_that_somebody_kills_is_replaced_unseen(trial) -> None:
    await trial.ask(DIGITS)
    os.kill(trial._child.pid, signal.SIGKILL)
    assert (await trial.ask(DIGITS)).grammar


async def test_a_trial_goes_on_when_its_client_goes(trial) -> None:
    grammars = Grammars(trial)
    await grammars.grammar(DIGITS, "p")
    pid = trial._child.pid
    given_up = asyncio.create_task(grammars.grammar(ENDLESS, "p"))
    await asyncio.sleep(0.05)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    with pytest.raises(BadRequest, match="takes too long"):
        await grammars.grammar(ENDLESS, "p")
    assert trial._child.pid == pid, "the process was replaced"


async def test_what_is_remembered_and_who_may_wait_are_bounded() -> None:
    trial = CountingTrial()
    grammars = Grammars(trial)
    texts = [f"{n:060000}" for n in range(200)]
    waiting = [asyncio.create_task(grammars.grammar(Asked("lark", text), "p")) for text in texts[:64]]
    await asyncio.sleep(0)
    with pytest.raises(BadRequest, match="'p' has 65537 characters"):
        await grammars.grammar(Asked("lark", "a" * 65537), "p")
    with pytest.raises(Overloaded):
        await grammars.grammar(Asked("lark", texts[64]), "p")
    trial.answers.set()
    assert await asyncio.gather(*waiting) == texts[:64]
    for text in texts:
        await grammars.grammar(Asked("lark", text), "p")
    assert sum(map(len, texts)) > 10 << 20
    assert sum(len(asked.text) + len(reply.grammar) for asked, reply in grammars._known.items()) <= 8 << 20
