"""Several choices of one prompt in the engine: computed once, shared by reference, each right by itself."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.engine import Engine
from services.engine.messages import Drop, DropChoice, Landed, Limits, Report, Start, Token
from tests.support.in_process_engine import build_engine, geometry
from tests.unit.engine.test_engine import engine, run, submit, turns

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # two full blocks and half of a third
Choices = dict[int, list[int]]


def used(subject: Engine) -> int:
    gauges = subject.take_report().gauges
    return gauges.blocks_total - gauges.blocks_free - gauges.blocks_cached


def answers(reports: list[Report], seq_id: str = "x") -> Choices:
    found: Choices = {}
    for token in tokens(reports, seq_id):
        found.setdefault(token.choice, []).append(token.token)
    return found


def tokens(reports: list[Report], seq_id: str = "x") -> list[Token]:
    return [token for report in reports for token in report.tokens if token.seq_id == seq_id]


def alone(prompt: list[int], max_tokens: int, choice: int) -> list[int]:
    return run(engine(), submit("x", prompt, max_tokens, choices=(choice,)))["x"]


def test_each_choice_is_what_it_would_be_alone_and_the_first_what_a_single_one_is() -> None:
    subject = engine()
    subject.handle(submit("x", PROMPT, 9, choices=(0, 1, 2)))
    found = answers(turns(subject))
    assert found == {choice: alone(PROMPT, 9, choice) for choice in (0, 1, 2)}
    assert found[0] == run(engine(), submit("x", PROMPT, 9))["x"]
    assert len({tuple(answer) for answer in found.values()}) == 3


def test_the_prompt_is_computed_once_and_its_full_blocks_are_shared() -> None:
    subject = engine()
    subject.handle(submit("x", PROMPT, 9, choices=(0, 1, 2, 3)))
    subject.step()
    subject.step()  # chunks of eight tokens: now the prompt is computed
    assert used(subject) == 2 + 4, "two blocks in common, and a partial one for each choice"
    subject.check_integrity()
    reports = turns(subject)
    assert sum(report.step.prefill_tokens for report in reports if report.step) == 0
    assert reports[-1].gauges.prompt_tokens == len(PROMPT)
    assert used(subject) == 0


def test_a_choice_writes_into_a_copy_of_the_partial_block() -> None:
    pool = memoryview(bytearray(geometry(16).shared_bytes))
    subject = build_engine(pool, 16)
    subject.handle(submit("x", PROMPT, 9, choices=(0, 1, 2)))
    subject.step()
    subject.step()
    shared, forks = _tables(subject)
    slots = pool.cast("B").cast("i").tolist()
    partial = [slots[8 * table[2] : 8 * table[2] + 2] for table in forks]
    assert partial == [PROMPT[8:]] * 3
    first = {token.choice: token.token for token in tokens([subject.take_report()])}
    subject.step()
    slots = pool.cast("B").cast("i").tolist()
    assert [slots[8 * table[2] : 8 * table[2] + 3] for table in forks] == [
        [*PROMPT[8:], first[choice]] for choice in (0, 1, 2)
    ]
    assert [slots[8 * block : 8 * block + 4] for block in shared] == [PROMPT[:4], PROMPT[4:8]]


def _tables(subject: Engine) -> tuple[list[int], list[list[int]]]:
    """The blocks that all choices have in common, and each one's table."""
    tables = [list(one.blocks) for one in subject._sequences["x"]]
    common = [table[:2] for table in tables]
    assert common == [common[0]] * len(tables)
    assert len({table[2] for table in tables}) == len(tables)
    return common[0], tables


def test_a_prompt_of_full_blocks_is_shared_without_a_copy() -> None:
    subject = engine()
    subject.handle(submit("x", PROMPT[:8], 5, choices=(0, 1, 2)))
    subject.step()
    assert used(subject) == 2
    assert answers(turns(subject))[1] == alone(PROMPT[:8], 5, 1)[1:]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_choices_do_not_depend_on_company_or_preemption(seed: int) -> None:
    rng = random.Random(seed)
    subject = engine(blocks=18)
    expected: dict[str, Choices] = {}
    for index in range(6):
        prompt = [rng.randrange(9) for _ in range(rng.randint(1, 30))]
        choices, max_tokens = tuple(range(rng.randint(1, 5))), rng.randint(1, 20)
        expected[f"s{index}"] = {choice: alone(prompt, max_tokens, choice) for choice in choices}
        subject.handle(submit(f"s{index}", prompt, max_tokens, choices=choices))
    reports = turns(subject)
    assert {seq_id: answers(reports, seq_id) for seq_id in expected} == expected
    assert used(subject) == 0


def test_a_choice_can_be_preempted_and_goes_on_from_the_shared_prompt() -> None:
    subject = engine(blocks=7)
    subject.handle(submit("x", PROMPT, 14, choices=(0, 1, 2)))
    reports = turns(subject)
    assert reports[-1].gauges.preemptions > 0
    assert answers(reports) == {choice: alone(PROMPT, 14, choice) for choice in (0, 1, 2)}
    assert used(subject) == 0


@pytest.mark.parametrize("blocks", [6, 7])
def test_choices_that_find_no_room_wait_for_it(blocks: int) -> None:
    subject = engine(blocks=blocks)
    subject.handle(submit("x", PROMPT, 12, choices=tuple(range(8))))
    reports = turns(subject)
    assert answers(reports) == {choice: alone(PROMPT, 12, choice) for choice in range(8)}
    assert max(report.gauges.waiting for report in reports) > 0
    assert len([event for report in reports for event in report.admitted]) == 1


def test_choices_beyond_the_bound_of_sequences_wait() -> None:
    limits = Limits(sequences_max=2, waiting_max=2, chunk_tokens_max=8, step_ms_target=100.0)
    subject = engine(limits=limits)
    subject.handle(submit("x", PROMPT, 6, choices=tuple(range(5))))
    reports = turns(subject)
    assert max(report.gauges.running for report in reports) == 2
    assert answers(reports) == {choice: alone(PROMPT, 6, choice) for choice in range(5)}


def test_admission_keeps_room_for_the_choices_of_those_who_are_here() -> None:
    subject = engine(blocks=16)
    subject.handle(submit("x", PROMPT, 4, choices=tuple(range(6))))  # three blocks, five copies, one to grow
    subject.step()
    subject.handle(submit("fits", [1] * 28, kind="receive"))
    subject.handle(submit("does not", [2] * 4, kind="receive"))
    report = subject.take_report()
    assert [admitted.seq_id for admitted in report.admitted] == ["x", "fits"]
    assert [refused.seq_id for refused in report.refused] == ["does not"]


def test_a_choice_that_ends_at_its_first_token_is_not_forked() -> None:
    ending = alone(PROMPT, 1, 1)[0]
    subject = engine()
    subject.handle(submit("x", PROMPT, 5, choices=(0, 1, 2), end_token_ids=(ending,)))
    subject.step()
    subject.step()
    report = subject.take_report()
    assert [(token.choice, token.finish) for token in report.tokens] == [(0, None), (1, "stop"), (2, None)]
    assert report.gauges.running == 2
    reports = turns(subject)
    assert sorted(answers(reports)) == [0, 2]
    assert used(subject) == 0


def test_choices_that_all_end_at_their_first_token_leave_nothing() -> None:
    subject = engine()
    subject.handle(submit("x", PROMPT, 1, choices=(0, 1, 2)))
    reports = turns(subject)
    assert [token.finish for token in tokens(reports)] == ["length"] * 3
    assert reports[-1].gauges.running == 0
    assert used(subject) == 0


def test_a_prefill_samples_all_choices_and_holds_its_blocks_once() -> None:
    subject = engine()
    subject.handle(submit("x", PROMPT, 5, kind="prefill", choices=(0, 1, 2)))
    reports = turns(subject)
    assert answers(reports) == {choice: alone(PROMPT, 1, choice) for choice in (0, 1, 2)}
    assert used(subject) == 3
    subject.handle(Drop("x"))
    assert used(subject) == 0


def received(target: Engine, pools: list[memoryview], choices: tuple[int, ...]) -> dict[int, int]:
    """A reservation on `target` that all KV has landed in; the first tokens."""
    source = build_engine(pools[0], 16)
    source.handle(submit("x", PROMPT, 6, kind="prefill", choices=choices))
    firsts = {token.choice: token.token for token in tokens(turns(source))}
    target.handle(submit("x", PROMPT, 6, kind="receive", choices=choices))
    target.take_report()
    pools[1][:] = pools[0]  # both pools are fresh, so the block tables are equal
    target.handle(Landed("x", len(PROMPT)))
    return firsts


def test_a_received_prompt_forks_into_the_choices_that_go_on() -> None:
    pools = [memoryview(bytearray(geometry(16).shared_bytes)) for _ in range(2)]
    target = build_engine(pools[1], 16)
    firsts = received(target, pools, (0, 1, 2, 3))
    target.handle(Start("x", {choice: firsts[choice] for choice in (1, 3)}))
    assert used(target) == 2 + 2
    reports = turns(target)
    assert answers(reports) == {choice: alone(PROMPT, 6, choice)[1:] for choice in (1, 3)}
    assert sum(report.step.prefill_tokens for report in reports if report.step) == 0


def test_a_reservation_needs_room_for_its_choices() -> None:
    subject = engine(blocks=8)
    subject.handle(submit("other", [7], 20))
    subject.step()
    subject.handle(submit("x", PROMPT, 5, kind="receive", choices=tuple(range(6))))
    assert [refused.code for refused in subject.take_report().refused] == ["overloaded"]


@pytest.mark.parametrize("steps", range(6))
def test_dropping_the_sequence_drops_all_its_choices(steps: int) -> None:
    subject = engine(blocks=7)
    subject.handle(submit("x", PROMPT, 9, choices=(0, 1, 2)))
    for _ in range(steps):
        subject.step()
    subject.handle(Drop("x"))
    subject.check_integrity()
    assert used(subject) == 0
    assert not subject.step()


@pytest.mark.parametrize("steps", range(6))
def test_a_dropped_choice_frees_its_blocks_and_the_others_go_on(steps: int) -> None:
    subject = engine(blocks=8)
    subject.handle(submit("x", PROMPT, 9, choices=(0, 1, 2)))
    for _ in range(steps):
        subject.step()
    subject.handle(DropChoice("x", 1))
    before = [subject.take_report()]
    subject.check_integrity()
    found = answers(before + turns(subject))
    assert [found[choice] for choice in (0, 2)] == [alone(PROMPT, 9, choice) for choice in (0, 2)]
    assert len(found.get(1, [])) < 9
    assert used(subject) == 0


def test_dropping_every_choice_ends_the_sequence() -> None:
    subject = engine()
    subject.handle(submit("x", PROMPT, 9, choices=(0, 1)))
    for step in range(3):
        subject.step()
        for choice in (0, 1):
            if step == choice + 1:
                subject.handle(DropChoice("x", choice))
    subject.handle(DropChoice("x", 1))  # once more is harmless
    assert used(subject) == 0
    assert not subject.step()
    subject.handle(submit("x", PROMPT, 1))
    assert len(tokens(turns(subject))) == 1


def test_choices_of_an_old_request_outlive_a_newer_one_when_blocks_run_out() -> None:
    subject = engine(blocks=9)
    subject.handle(submit("old", PROMPT, 12, choices=(0, 1)))
    subject.step()
    subject.step()
    subject.handle(submit("new", [7, 7], 20))
    reports = turns(subject)
    last = [token.seq_id for report in reports for token in report.tokens if token.finish]
    assert reports[-1].gauges.preemptions > 0
    assert last == ["old", "old", "new"]
