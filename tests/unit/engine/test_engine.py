"""The engine as a whole, over the arithmetic runner: its tokens prove every block table and schedule."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.sampling import SamplingParams
from services.engine.engine import Engine
from services.engine.messages import Drop, Kind, Landed, Limits, Report, Start, Submit
from tests.support.in_process_engine import LIMITS, build_engine, geometry

Answers = dict[str, list[int]]


def engine(blocks: int = 64, limits: Limits = LIMITS) -> Engine:
    return build_engine(memoryview(bytearray(geometry(blocks).shared_bytes)), blocks, limits)


def submit(
    seq_id: str,
    prompt: list[int],
    max_tokens: int = 4,
    kind: Kind = "local",
    outputs: tuple[int, ...] = (),
    choices: tuple[int, ...] = (0,),
    **params: object,
) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Submit(seq_id, kind, prompt, list(outputs), sampling, choices=choices)


def turns(engine: Engine) -> list[Report]:
    """Run until nothing moves; the books must be right after every step."""
    reports = []
    progressed = True
    while progressed:
        progressed = engine.step()
        reports.append(engine.take_report())
        engine.check_integrity()
    return reports


def run(engine: Engine, *submits: Submit) -> Answers:
    for one in submits:
        engine.handle(one)
    answers: Answers = {one.seq_id: [] for one in submits}
    for report in turns(engine):
        for token in report.tokens:
            assert token.index == len(answers[token.seq_id])
            answers[token.seq_id].append(token.token)
    return answers


def random_submits(rng: random.Random, count: int) -> list[Submit]:
    return [
        submit(f"s{i}", [rng.randrange(9) for _ in range(rng.randint(1, 30))], rng.randint(1, 30))
        for i in range(count)
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_answers_do_not_depend_on_company_or_preemption(seed: int) -> None:
    submits = random_submits(random.Random(seed), 12)
    alone = {one.seq_id: run(engine(), one)[one.seq_id] for one in submits}
    small_pool = engine(blocks=18)
    assert run(small_pool, *submits) == alone
    gauges = small_pool.take_report().gauges
    assert gauges.blocks_free + gauges.blocks_cached == gauges.blocks_total


def test_a_small_pool_preempts_and_still_finishes_everything() -> None:
    crowded = engine(blocks=18)
    answers = run(crowded, *[submit(f"s{i}", [i] * 20, 30) for i in range(6)])
    assert all(len(answer) == 30 for answer in answers.values())
    assert crowded.take_report().gauges.preemptions > 0


def test_an_answer_goes_on_where_another_attempt_stopped() -> None:
    whole = run(engine(), submit("a", [1, 2, 3], max_tokens=10))["a"]
    resumed = engine()
    resumed.handle(submit("a", [1, 2, 3], max_tokens=10, outputs=tuple(whole[:6])))
    tokens = [token for report in turns(resumed) for token in report.tokens]
    assert [token.index for token in tokens] == [6, 7, 8, 9]
    assert [token.token for token in tokens] == whole[6:]


def test_the_next_turn_reuses_the_blocks_of_prompt_and_answer() -> None:
    subject = engine()
    prompt = list(range(10))
    answer = run(subject, submit("a", prompt, max_tokens=12))["a"]
    subject.handle(submit("b", [*prompt, *answer, 7, 7], max_tokens=2))
    admitted = [event for report in turns(subject) for event in report.admitted]
    # 22 tokens are known, the KV of the last was never computed: five full blocks of four.
    assert admitted[0].cached_tokens == 20


def test_tenants_with_different_salts_share_no_block() -> None:
    subject = engine()
    params = SamplingParams(max_tokens=1)
    for seq_id, salt in (("a", "red"), ("b", "blue"), ("c", "red")):
        subject.handle(Submit(seq_id, "local", list(range(16)), [], params, salt=salt))
        admitted = [event for report in turns(subject) for event in report.admitted]
        assert admitted[0].cached_tokens == (12 if seq_id == "c" else 0)


def test_a_whole_cached_prompt_still_computes_its_last_token() -> None:
    subject = engine()
    first = run(subject, submit("a", list(range(16)), max_tokens=1))
    assert run(subject, submit("b", list(range(16)), max_tokens=1))["b"] == first["a"]


def test_a_prompt_is_computed_in_chunks_while_others_decode() -> None:
    subject = engine()
    subject.handle(submit("decoding", [1], max_tokens=40))
    subject.step()
    subject.handle(submit("long", list(range(40)), max_tokens=1))
    steps = [report.step for report in turns(subject) if report.step]
    mixed = [step for step in steps if step.prefill_tokens and step.decode_tokens]
    assert len(mixed) == 5
    assert all(step.prefill_tokens <= LIMITS.chunk_tokens_max for step in steps)


def test_a_prompt_gets_its_blocks_chunk_by_chunk() -> None:
    subject = engine()
    subject.handle(submit("long", list(range(40)), max_tokens=2))
    used = []
    while subject.step():
        gauges = subject.take_report().gauges
        used.append(gauges.blocks_total - gauges.blocks_free - gauges.blocks_cached)
    assert used == [2, 4, 6, 8, 10, 0]


def test_a_reservation_leaves_room_for_prompts_that_are_half_computed_or_waiting() -> None:
    subject = engine(blocks=16)
    subject.handle(submit("computing", list(range(30)), max_tokens=2))  # will want nine blocks
    subject.step()
    subject.handle(submit("waiting", [1, 2, 3, 4], max_tokens=2))
    subject.take_report()
    subject.handle(submit("fits", [1] * 16, kind="receive"))
    subject.handle(submit("does not", [2] * 17, kind="receive"))
    report = subject.take_report()
    assert [admitted.seq_id for admitted in report.admitted] == ["fits"]
    assert [refused.seq_id for refused in report.refused] == ["does not"]


def test_the_queue_is_reported_without_what_is_cached() -> None:
    crowded = engine()  # computes 8 tokens in a step
    prompt = list(range(40))
    run(crowded, submit("first", prompt, 1))
    crowded.handle(submit("again", [*prompt, *range(20)], 1))
    crowded.handle(submit("other", [9] * 30, 1))
    crowded.step()
    gauges = crowded.take_report().gauges
    cached = 40  # ten blocks
    assert gauges.queued_prefill_tokens == (60 - cached - 8) + 30
    assert gauges.queued_prefill_context == sum(range(cached + 8, 60)) + sum(range(30))


def test_what_decodes_or_is_about_to_is_reported_with_its_context() -> None:
    busy = engine()
    busy.handle(submit("decodes", [1] * 10, 30))
    busy.handle(submit("received", [2] * 20, kind="receive"))
    busy.handle(submit("prefill", [3] * 50, kind="prefill"))
    for _ in range(3):  # the prompt in two, and its second token beside the next prompt's first chunk
        busy.step()
    gauges = busy.take_report().gauges
    assert (gauges.running, gauges.running_context) == (3, 12 + 20)
    assert gauges.model is not None


def test_an_end_token_stops_the_answer_and_is_part_of_it() -> None:
    answer = run(engine(), submit("a", [5, 6], max_tokens=20))["a"]
    subject = engine()
    subject.handle(submit("a", [5, 6], max_tokens=20, end_token_ids=(answer[3],)))
    tokens = [token for report in turns(subject) for token in report.tokens]
    assert [token.token for token in tokens] == answer[:4]
    assert [token.finish for token in tokens] == [None, None, None, "stop"]


def test_a_prefill_sequence_keeps_its_blocks_until_it_is_dropped() -> None:
    subject = engine()
    subject.handle(submit("p", list(range(10)), kind="prefill"))
    reports = turns(subject)
    assert [event.computed for report in reports for event in report.advanced] == [8, 10]
    assert len([token for report in reports for token in report.tokens]) == 1
    assert reports[-1].gauges.blocks_total - reports[-1].gauges.blocks_free == 3
    subject.handle(Drop("p"))
    report = subject.take_report()
    assert report.dropped == ["p"]
    assert report.gauges.blocks_free + report.gauges.blocks_cached == report.gauges.blocks_total


def received(source: Engine, target: Engine, prompt: list[int], max_tokens: int) -> tuple[Report, int]:
    """Compute on `source`, reserve on `target`; the admission's report and the first token."""
    source.handle(submit("x", prompt, max_tokens, kind="prefill"))
    first = next(token.token for report in turns(source) for token in report.tokens)
    target.handle(submit("x", prompt, max_tokens, kind="receive"))
    return target.take_report(), first


def test_a_received_sequence_decodes_from_the_first_token_without_computing_the_prompt() -> None:
    pools = [memoryview(bytearray(geometry(16).shared_bytes)) for _ in range(2)]
    source, target = (build_engine(pool, 16) for pool in pools)
    prompt = list(range(10))
    expected = run(engine(), submit("x", prompt, max_tokens=6))["x"]
    report, first = received(source, target, prompt, max_tokens=6)
    assert report.admitted[0].cached_tokens == 0
    pools[1][:] = pools[0]  # both pools are fresh, so the block tables are equal
    target.handle(Landed("x", 10))
    target.handle(Start("x", {0: first}))
    reports = turns(target)
    assert [first, *(token.token for one in reports for token in one.tokens)] == expected
    assert sum(one.step.prefill_tokens for one in reports if one.step) == 0


def test_proven_kv_of_a_transfer_that_failed_stays_as_cache() -> None:
    subject = engine()
    prompt = list(range(10))
    subject.handle(submit("first", prompt, kind="receive"))
    subject.handle(Landed("first", 10, proven=9))
    subject.handle(Drop("first"))
    subject.handle(submit("again", prompt, kind="receive"))
    report = subject.take_report()
    assert report.admitted[1].cached_tokens == 8, "two of the blocks were full and proven"
    assert report.admitted[1].block_ids[:2] == report.admitted[0].block_ids[:2]
    subject.check_integrity()


def test_unproven_kv_of_a_transfer_that_failed_is_forgotten() -> None:
    subject = engine()
    subject.handle(submit("first", list(range(10)), kind="receive"))
    subject.handle(Landed("first", 10))
    subject.handle(Drop("first"))
    report = subject.take_report()
    assert report.stored == []
    assert report.gauges.blocks_cached == 0


def test_a_reservation_is_refused_at_once_when_there_is_no_room() -> None:
    subject = engine(blocks=4)
    subject.handle(submit("big", list(range(20)), kind="receive"))
    assert [refused.code for refused in subject.take_report().refused] == ["overloaded"]


def growing_beside_a_reservation() -> Engine:
    """Six blocks: a decoding sequence that wants more and more, and a reservation of three."""
    subject = engine(blocks=6)
    subject.handle(submit("grows", [1, 2, 3], max_tokens=18))
    subject.step()
    subject.handle(submit("reserved", list(range(9)), kind="receive"))
    assert subject.take_report().admitted
    return subject


def test_growth_asks_a_reservation_back_and_waits_for_its_drop() -> None:
    subject = growing_beside_a_reservation()
    reports = turns(subject)
    assert [event.seq_id for report in reports for event in report.revoked] == ["reserved"]
    assert sum(len(report.tokens) for report in reports) < 17, "it took blocks that KV may be landing in"
    subject.handle(Drop("reserved"))
    assert [token.finish for report in turns(subject) for token in report.tokens][-1] == "length"


def test_a_start_that_crosses_its_revocation_wins() -> None:
    subject = growing_beside_a_reservation()
    turns(subject)
    subject.handle(Landed("reserved", 9))
    subject.handle(Start("reserved", {0: 42}))
    finished = {token.seq_id for report in turns(subject) for token in report.tokens if token.finish}
    assert finished == {"grows", "reserved"}


def test_a_prompt_behind_nothing_but_reservations_gets_one_back() -> None:
    subject = engine(blocks=8)
    subject.handle(submit("reserved", list(range(24)), kind="receive"))
    subject.handle(submit("computes", [1] * 24, kind="prefill"))
    reports = turns(subject)
    assert [event.seq_id for report in reports for event in report.revoked] == ["reserved"]
    subject.handle(Drop("reserved"))
    assert [token.seq_id for report in turns(subject) for token in report.tokens] == ["computes"]


def test_more_waiting_sequences_than_the_bound_are_refused() -> None:
    subject = engine(
        blocks=4, limits=Limits(sequences_max=1, waiting_max=2, chunk_tokens_max=8, step_ms_target=100)
    )
    for index in range(4):
        subject.handle(submit(f"s{index}", [1, 2, 3]))
    assert [refused.seq_id for refused in subject.take_report().refused] == ["s2", "s3"]


def test_dropping_in_any_state_gives_every_block_back() -> None:
    for steps in range(8):
        subject = engine(blocks=16)
        subject.handle(submit("a", list(range(20)), max_tokens=9))
        for _ in range(steps):
            subject.step()
        subject.handle(Drop("a"))
        subject.check_integrity()
        gauges = subject.take_report().gauges
        assert gauges.blocks_free + gauges.blocks_cached == 16
