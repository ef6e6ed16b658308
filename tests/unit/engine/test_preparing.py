"""A sequence waits for what its runner prepares outside the steps; nobody waits for it."""

from services.core.clock import SystemClock
from services.core.errors import BadRequest
from services.core.sampling import SamplingParams
from services.engine.engine import Engine
from services.engine.messages import Drop, DropChoice, Submit, Token
from services.engine.runner import ArithmeticRunner
from tests.support.in_process_engine import LIMITS, compatibility, geometry


class PreparingRunner(ArithmeticRunner):
    """Has the grammars in `ready`; "bad" is none."""

    def __init__(self) -> None:
        shape = geometry(64)
        super().__init__(shape, memoryview(bytearray(shape.shared_bytes)))
        self.ready = {""}

    def prepare(self, params: SamplingParams) -> bool:
        if params.grammar == "bad":
            raise BadRequest("no grammar")
        return params.grammar in self.ready


def submit(seq_id: str, grammar: str, choices: tuple[int, ...] = (0,)) -> Submit:
    return Submit(seq_id, "local", [3, 4], [], SamplingParams(max_tokens=3, grammar=grammar), choices=choices)


def tokens(engine: Engine) -> set[tuple[str, int]]:
    """Whose tokens come until nothing moves."""
    seen: list[Token] = []
    while engine.step():
        seen += engine.take_report().tokens
        engine.check_integrity()
    return {(token.seq_id, token.choice) for token in seen}


def started() -> tuple[Engine, PreparingRunner]:
    runner = PreparingRunner()
    return Engine(runner, compatibility(), 64, LIMITS, SystemClock()), runner


def test_others_go_on_until_it_is_ready() -> None:
    engine, runner = started()
    engine.handle(submit("late", "some"))
    engine.handle(submit("other", ""))
    assert tokens(engine) == {("other", 0)}
    assert engine.preparing
    runner.ready.add("some")
    assert tokens(engine) == {("late", 0)}
    assert not engine.preparing


def test_what_is_dropped_meanwhile_never_begins() -> None:
    engine, runner = started()
    engine.handle(submit("a", "some", choices=(0, 1)))
    engine.handle(submit("b", "some", choices=(0, 1)))
    engine.handle(Drop("a"))
    engine.handle(DropChoice("b", 0))
    assert engine.take_report().dropped == ["a"]
    runner.ready.add("some")
    assert tokens(engine) == {("b", 1)}


def test_what_cannot_be_prepared_is_refused() -> None:
    engine, _ = started()
    engine.handle(submit("a", "bad"))
    (refused,) = engine.take_report().refused
    assert (refused.seq_id, refused.code, refused.message) == ("a", "bad_request", "no grammar")
    assert not engine.preparing
