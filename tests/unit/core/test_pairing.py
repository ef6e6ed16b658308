"""Workers between which no KV can move share no request, and the reason names what differs."""

from msgspec.structs import replace

from services.core.pairing import unpaired
from services.core.worker_report import Role
from tests.unit.core.test_worker_report import REPORT

OTHER = replace(REPORT.compatibility, quantization="w4w8a8-g32")


def worker(worker_id: str, role: Role, quantised: bool = False):
    compatibility = OTHER if quantised else REPORT.compatibility
    return replace(REPORT, worker_id=worker_id, role=role, compatibility=compatibility)


def test_both_halves_of_a_pair_that_cannot_be_are_named() -> None:
    why = unpaired([worker("p", "prefill", quantised=True), worker("d", "decode")])
    assert why == {
        "p": "no KV can move between it and d: quantization: w4w8a8-g32 != none",
        "d": "no KV can move between it and p: quantization: none != w4w8a8-g32",
    }


def test_one_partner_is_enough() -> None:
    workers = [worker("p", "prefill"), worker("d", "decode"), worker("d8", "decode", quantised=True)]
    assert list(unpaired(workers)) == ["d8"]


def test_where_nobody_does_the_other_part_there_is_nothing_to_tell() -> None:
    assert unpaired([worker("d", "decode"), worker("d8", "decode", quantised=True)]) == {}
    assert unpaired([worker("b", "both")]) == {}


def test_another_block_size_is_no_obstacle() -> None:
    other = replace(REPORT.compatibility, block_size=32)
    large = replace(worker("p", "prefill"), compatibility=other)
    assert unpaired([large, worker("d", "decode")]) == {}
