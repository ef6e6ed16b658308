"""Logprobs of prompts: each token's once, whatever is cached, cut into chunks or preempted."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.logprobs import TokenLogprobs
from services.engine.engine import Engine
from services.engine.messages import Limits, Report, Submit
from tests.unit.engine.test_engine import engine, submit, turns

LIMITS = Limits(sequences_max=16, waiting_max=64, chunk_tokens_max=8, step_ms_target=100.0)


def scores(reports: list[Report], seq_id: str) -> list[TokenLogprobs]:
    """Of a prompt's tokens from the second on; each comes once, in order and before the answer."""
    result: list[TokenLogprobs] = []
    answered = False
    for report in reports:
        for part in report.scored:
            if part.seq_id == seq_id:
                assert not answered
                assert part.logprobs.first == len(result) + 1
                result += part.logprobs.tokens()
        answered = answered or any(token.seq_id == seq_id for token in report.tokens)
    return result


def run(subject: Engine, *submits: Submit) -> list[Report]:
    for one in submits:
        subject.handle(one)
    return turns(subject)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_every_token_is_scored_once_whatever_the_company_the_cache_and_preemption(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randrange(3) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    submits = [
        submit(f"s{n}", prompt, rng.randint(1, 20), prompt_logprobs=rng.choice([None, 0, 2]))
        for n, prompt in enumerate(prompts)
    ]
    alone = {one.seq_id: scores(run(engine(limits=LIMITS), one), one.seq_id) for one in submits}
    crowded = engine(blocks=18, limits=LIMITS)
    reports = run(crowded, *submits)
    for one in submits:
        wanted = one.sampling.prompt_logprobs is not None
        assert len(alone[one.seq_id]) == (len(one.prompt_ids) - 1 if wanted else 0)
        assert scores(reports, one.seq_id) == alone[one.seq_id]


def test_a_preempted_prompt_reuses_what_is_scored_and_computes_the_rest() -> None:
    subject = engine(blocks=18, limits=LIMITS)
    submits = [submit(f"s{n}", [n] * 20, 30, prompt_logprobs=0) for n in range(6)]
    reports = run(subject, *submits)
    assert subject.take_report().gauges.preemptions > 0
    assert all(len(scores(reports, one.seq_id)) == 19 for one in submits)


def test_a_prompt_that_is_scored_reads_no_cached_block_and_leaves_its_own_to_others() -> None:
    subject = engine()
    prompt = list(range(20))
    first = run(subject, submit("a", prompt, 1))
    scored = run(subject, submit("b", prompt, 1, prompt_logprobs=1))
    assert [event.cached_tokens for report in scored for event in report.admitted] == [0]
    assert len(scores(scored, "b")) == 19
    assert [t.token for r in scored for t in r.tokens] == [t.token for r in first for t in r.tokens]
    again = run(subject, submit("c", prompt, 1))
    assert [event.cached_tokens for report in again for event in report.admitted] == [16]
    fresh = engine()
    run(fresh, submit("a", prompt, 1, prompt_logprobs=1))
    reused = run(fresh, submit("b", prompt, 1))
    assert [event.cached_tokens for report in reused for event in report.admitted] == [16]


def test_a_prompt_that_is_scored_neither_fetches_nor_waits_for_its_prefix() -> None:
    subject = engine(limits=LIMITS)
    prompt = list(range(20))
    sampling = submit("x", prompt, 2, prompt_logprobs=0).sampling
    subject.handle(submit("ahead", prompt, 2))
    subject.handle(Submit("b", "local", prompt, [], sampling, fetch_tokens=16))
    reports = turns(subject)
    assert all(event.fetch_tokens == 0 for report in reports for event in report.admitted)
    assert len(scores(reports, "b")) == 19


def test_a_reader_of_anothers_kv_scores_nothing_and_may_use_its_cache() -> None:
    subject = engine()
    prompt = list(range(20))
    run(subject, submit("a", prompt, 1))
    subject.handle(submit("b", prompt, 4, kind="receive", prompt_logprobs=3))
    (admitted,) = subject.take_report().admitted
    assert admitted.cached_tokens == 20


def test_tokens_carry_logprobs_only_where_they_were_asked_for() -> None:
    reports = run(engine(), submit("plain", [1, 2, 3]), submit("scored", [1, 2, 3], top_logprobs=2))
    for token in [token for report in reports for token in report.tokens]:
        assert (token.logprobs is not None) == (token.seq_id == "scored")
        assert token.logprobs is None or len(token.logprobs.top_ids) == 2
