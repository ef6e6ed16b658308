"""Prefixes that move between engines: one lends cached blocks, another waits for their KV and goes on."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.sampling import SamplingParams
from services.engine.engine import Engine
from services.engine.messages import Admitted, Drop, DropChoice, Fetched, Kind, Landed, Lend, Report, Submit
from tests.support.in_process_engine import build_engine, geometry

PROMPT = list(range(100, 142))  # ten blocks of four tokens and two more
BLOCKS = 64


@dataclass
class Worker:
    """An engine and the memory of its pool."""

    blocks: int = BLOCKS
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        shape = geometry(self.blocks)
        self.pool = memoryview(bytearray(shape.shared_bytes))
        self.engine = build_engine(self.pool, self.blocks)
        self.block_bytes = shape.block_bytes

    def turns(self) -> list[Report]:
        """Run until nothing moves; the books must be right after every step."""
        reports = [self.engine.take_report()]
        progressed = True
        while progressed:
            progressed = self.engine.step()
            reports.append(self.engine.take_report())
            self.engine.check_integrity()
        return reports

    def run(self, submit: Submit) -> list[int]:
        self.engine.handle(submit)
        return tokens_of(self.turns())[submit.seq_id]

    def admit(self, submit: Submit) -> Admitted:
        self.engine.handle(submit)
        return next(event for report in self.turns() for event in report.admitted)

    def lend(self, token_ids: list[int], salt: str = "") -> Report:
        self.engine.handle(Lend("loan", token_ids, salt))
        return self.engine.take_report()

    def copy_from(self, source: "Worker", theirs: list[int], ours: list[int]) -> None:
        size = self.block_bytes
        for their, our in zip(theirs, ours, strict=False):
            self.pool[our * size : (our + 1) * size] = source.pool[their * size : (their + 1) * size]

    @property
    def free_or_cached(self) -> int:
        gauges = self.engine.take_report().gauges
        return gauges.blocks_free + gauges.blocks_cached


def submit(
    seq_id: str, prompt: list[int] = PROMPT, kind: Kind = "local", fetch_tokens: int = 0, max_tokens: int = 4
) -> Submit:
    return Submit(seq_id, kind, prompt, [], SamplingParams(max_tokens=max_tokens), fetch_tokens=fetch_tokens)


def tokens_of(reports: list[Report]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for report in reports:
        for token in report.tokens:
            tokens.setdefault(token.seq_id, []).append(token.token)
    return tokens


def computed_in(reports: list[Report]) -> int:
    return sum(report.step.prefill_tokens for report in reports if report.step)


def warm_worker() -> Worker:
    worker = Worker()
    worker.run(submit("warm", max_tokens=1))
    return worker


class TestLending:
    def test_a_loan_is_the_cached_part_of_the_chain(self) -> None:
        (loan,) = warm_worker().lend([*PROMPT[:24], 7, 7, 7, 7]).admitted
        assert (loan.cached_tokens, len(loan.block_ids)) == (24, 6)

    def test_lent_blocks_are_not_evicted_until_they_are_dropped(self) -> None:
        source = warm_worker()
        (loan,) = source.lend(PROMPT).admitted
        expected = [
            bytes(source.pool[b * source.block_bytes :][: source.block_bytes]) for b in loan.block_ids
        ]
        for index in range(20):  # far more than the pool holds
            source.run(submit(f"other{index}", [index] * 30))
        found = [bytes(source.pool[b * source.block_bytes :][: source.block_bytes]) for b in loan.block_ids]
        assert found == expected
        source.engine.handle(Drop("loan"))
        report = source.engine.take_report()
        assert report.dropped == ["loan"]
        assert report.gauges.blocks_free + report.gauges.blocks_cached == BLOCKS
        source.engine.check_integrity()

    def test_blocks_that_a_running_sequence_uses_are_lent_too(self) -> None:
        source = Worker()
        source.engine.handle(submit("held", kind="prefill"))
        source.turns()
        assert source.lend(PROMPT).admitted[0].cached_tokens == 40
        for name in ("held", "loan"):
            source.engine.handle(Drop(name))
            source.engine.check_integrity()
        assert source.free_or_cached == BLOCKS

    @pytest.mark.parametrize(("token_ids", "salt"), [([1, 2, 3, 4], ""), (PROMPT, "other"), (PROMPT[:3], "")])
    def test_what_is_not_cached_is_refused(self, token_ids: list[int], salt: str) -> None:
        report = warm_worker().lend(token_ids, salt)
        assert [(refused.seq_id, refused.code) for refused in report.refused] == [("loan", "kv_source_lost")]


@pytest.mark.parametrize("kind", ["local", "prefill"])
class TestFetching:
    def test_a_fetched_prefix_is_not_computed_and_gives_the_same_tokens(self, kind: Kind) -> None:
        source, reader = warm_worker(), Worker()
        (loan,) = source.lend(PROMPT).admitted
        admitted = reader.admit(submit("x", kind=kind, fetch_tokens=40))
        assert (admitted.cached_tokens, admitted.fetch_tokens, len(admitted.block_ids)) == (0, 40, 10)
        reader.copy_from(source, loan.block_ids, admitted.block_ids)
        reader.engine.handle(landed(40))
        reader.engine.handle(Fetched("x"))
        reports = reader.turns()
        expected = Worker().run(submit("x"))
        assert tokens_of(reports)["x"] == expected[: len(tokens_of(reports)["x"])]
        assert computed_in(reports) == 2

    def test_nothing_of_it_is_computed_while_it_waits(self, kind: Kind) -> None:
        reader = Worker()
        reader.engine.handle(submit("x", kind=kind, fetch_tokens=40))
        reports = reader.turns()
        assert computed_in(reports) == 0
        assert reports[-1].gauges.queued_prefill_tokens == 2

    def test_a_fetch_that_broke_is_completed_by_computing(self, kind: Kind) -> None:
        source, reader = warm_worker(), Worker()
        (loan,) = source.lend(PROMPT).admitted
        admitted = reader.admit(submit("x", kind=kind, fetch_tokens=40))
        reader.copy_from(source, loan.block_ids[:3], admitted.block_ids)
        reader.pool[admitted.block_ids[3] * reader.block_bytes] ^= 255  # not proven, so never looked at
        reader.engine.handle(landed(12))
        reader.engine.handle(Fetched("x"))
        reports = reader.turns()
        expected = Worker().run(submit("x"))
        assert tokens_of(reports)["x"] == expected[: len(tokens_of(reports)["x"])]
        assert computed_in(reports) == 30

    def test_what_landed_but_was_not_proven_is_computed(self, kind: Kind) -> None:
        reader = Worker()
        admitted = reader.admit(submit("x", kind=kind, fetch_tokens=40))
        pool_bytes = BLOCKS * reader.block_bytes
        reader.pool[:pool_bytes] = bytes([255]) * pool_bytes
        reader.engine.handle(Landed("x", 40, proven=0))
        assert not reader.engine.take_report().stored
        reader.engine.handle(Fetched("x"))
        reports = reader.turns()
        expected = Worker().run(submit("x"))
        assert len(admitted.block_ids) == 10
        assert tokens_of(reports)["x"] == expected[: len(tokens_of(reports)["x"])]
        assert computed_in(reports) == len(PROMPT)

    def test_a_sequence_that_fetches_lets_those_behind_it_pass(self, kind: Kind) -> None:
        reader = Worker()
        reader.engine.handle(submit("fetches", kind=kind, fetch_tokens=40))
        reader.engine.handle(submit("behind", [5] * 9))
        assert len(tokens_of(reader.turns())["behind"]) == 4
        reader.engine.handle(Fetched("fetches"))
        assert "fetches" in tokens_of(reader.turns())

    def test_one_that_wants_the_same_prefix_waits_for_it_and_fetches_nothing(self, kind: Kind) -> None:
        source, reader = warm_worker(), Worker()
        (loan,) = source.lend(PROMPT).admitted
        admitted = reader.admit(submit("first", kind=kind, fetch_tokens=40))
        reader.engine.handle(submit("second", [*PROMPT[:36], 7, 7, 7], kind=kind, fetch_tokens=36))
        reader.engine.handle(submit("other", [5] * 9))
        waiting = reader.turns()
        assert set(tokens_of(waiting)) == {"other"}
        reader.copy_from(source, loan.block_ids, admitted.block_ids)
        reader.engine.handle(landed(40, "first"))
        reader.engine.handle(Fetched("first"))
        reports = reader.turns()
        (second,) = [event for report in reports for event in report.admitted]
        assert (second.seq_id, second.cached_tokens, second.fetch_tokens) == ("second", 36, 0)
        assert computed_in(reports) == 2 + 3

    @pytest.mark.parametrize("ends", [Fetched("first"), Drop("first")])
    def test_one_that_waits_for_a_fetch_goes_on_without_it(self, kind: Kind, ends: Fetched | Drop) -> None:
        reader = Worker()
        reader.admit(submit("first", kind=kind, fetch_tokens=40))
        reader.engine.handle(submit("second", PROMPT[:20], kind=kind))
        assert not tokens_of(reader.turns())
        reader.engine.handle(ends)
        assert tokens_of(reader.turns())["second"]

    def test_what_is_cached_here_meanwhile_is_not_fetched(self, kind: Kind) -> None:
        reader = warm_worker()
        admitted = reader.admit(submit("x", kind=kind, fetch_tokens=40))
        assert (admitted.cached_tokens, admitted.fetch_tokens) == (40, 0)

    def test_only_what_is_lacking_is_fetched(self, kind: Kind) -> None:
        reader = Worker()
        reader.run(submit("turn", PROMPT[:17], max_tokens=1))
        admitted = reader.admit(submit("x", kind=kind, fetch_tokens=40))
        assert (admitted.cached_tokens, admitted.fetch_tokens, len(admitted.block_ids)) == (16, 40, 10)

    def test_the_last_token_is_computed_whatever_is_offered(self, kind: Kind) -> None:
        admitted = Worker().admit(submit("x", PROMPT[:40], kind=kind, fetch_tokens=40))
        assert admitted.fetch_tokens == 36

    def test_what_landed_stays_cached_when_the_sequence_is_dropped(self, kind: Kind) -> None:
        source, reader = warm_worker(), Worker()
        (loan,) = source.lend(PROMPT).admitted
        admitted = reader.admit(submit("x", kind=kind, fetch_tokens=40))
        reader.copy_from(source, loan.block_ids, admitted.block_ids)
        reader.engine.handle(landed(20))
        reader.engine.handle(Drop("x"))
        reader.engine.check_integrity()
        assert reader.admit(submit("y")).cached_tokens == 20
        assert reader.run(submit("z")) == Worker().run(submit("z"))


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(0, 60), st.integers(1, 30))
def test_a_fetch_is_never_preempted_for_the_growth_of_others(
    landing: int, steps: int, grown_tokens: int
) -> None:
    """A small pool: the fetch holds ten of its blocks while others grow, are preempted and finish."""
    source, reader = warm_worker(), Worker(blocks=24)
    (loan,) = source.lend(PROMPT).admitted
    admitted = reader.admit(submit("fetches", fetch_tokens=40))
    for index in range(3):
        reader.engine.handle(submit(f"grows{index}", [index] * 7, max_tokens=grown_tokens))
    reports = []
    for _ in range(steps):
        reader.engine.step()
        reports.append(reader.engine.take_report())
        reader.engine.check_integrity()
    reader.copy_from(source, loan.block_ids, admitted.block_ids)
    reader.engine.handle(landed(landing, "fetches"))
    reader.engine.handle(Fetched("fetches"))
    answers = tokens_of(reports + reader.turns())
    assert answers["fetches"] == Worker().run(submit("fetches"))
    for index in range(3):
        alone = submit(f"grows{index}", [index] * 7, max_tokens=grown_tokens)
        assert answers[alone.seq_id] == Worker().run(alone)


def landed(tokens: int, seq_id: str = "x") -> Landed:
    return Landed(seq_id, tokens, proven=tokens)


def test_several_choices_share_one_fetch() -> None:
    source, reader = warm_worker(), Worker()
    (loan,) = source.lend(PROMPT).admitted
    several = Submit("x", "local", PROMPT, [], SamplingParams(max_tokens=4), choices=(0, 1, 2))
    reader.engine.handle(msgspec.structs.replace(several, fetch_tokens=40))
    (admitted,) = [event for report in reader.turns() for event in report.admitted]
    reader.copy_from(source, loan.block_ids, admitted.block_ids)
    reader.engine.handle(DropChoice("x", 1))  # while KV is on its way
    reader.engine.handle(landed(40))
    reader.engine.handle(Fetched("x"))
    fetched, alone = reader.turns(), Worker()
    alone.engine.handle(several)
    assert by_choice(fetched) == {c: ids for c, ids in by_choice(alone.turns()).items() if c != 1}
    assert computed_in(fetched) == 2


def by_choice(reports: list[Report]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for report in reports:
        for token in report.tokens:
            tokens.setdefault(token.choice, []).append(token.token)
    return tokens
