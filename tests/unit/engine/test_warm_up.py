"""A worker has measured its steps, and owns nothing, before the first request."""

import pytest

from services.engine.messages import Submit
from tests.support.in_process_engine import build_engine, geometry
from tests.unit.engine.test_fetch import PROMPT, submit, tokens_of


def answer(blocks: int, warm: bool) -> tuple[list[int], bool]:
    """The tokens of an answer, and whether the first report of all had a model of the steps."""
    pool = memoryview(bytearray(geometry(blocks).shared_bytes))
    engine = build_engine(pool, blocks)
    if warm:
        engine.warm_up()
    engine.check_integrity()
    model = engine.take_report().gauges.model
    command: Submit = submit("x", PROMPT)
    engine.handle(command)
    reports = [engine.take_report()]
    while engine.step():
        reports.append(engine.take_report())
    engine.check_integrity()
    return tokens_of(reports)["x"], bool(model and model.knows_prefill and model.knows_decode)


@pytest.mark.parametrize("blocks", [16, 1024])
def test_a_warm_engine_has_a_model_of_its_steps_and_answers_as_a_cold_one(blocks: int) -> None:
    cold, cold_knows = answer(blocks, warm=False)
    assert answer(blocks, warm=True) == (cold, True)
    assert not cold_knows
