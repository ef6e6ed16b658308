"""Verdicts, the choice of settings, and what is shown of a run."""

from pathlib import Path

import pytest

from tests.bench.cpu.aims import judge
from tests.bench.cpu.contestant import Family, Precision
from tests.bench.cpu.diptych import blocks_for
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import HEADLINE, LONG, SHORT, cell
from tests.bench.cpu.plan import contestants, plan
from tests.bench.cpu.results import TRIAL, Failure, Repetition, Results, Session
from tests.bench.cpu.tables import tables

FAMILIES: dict[str, tuple[Family, Precision]] = {
    "Diptych 1+1 int8 Q4_1": ("Diptych", "4 bits"),
    "Diptych both int8 Q4_1": ("Diptych", "4 bits"),
    "llama.cpp Q4_1": ("llama.cpp", "4 bits"),
    "vLLM float32": ("vLLM", "float32"),
    "vLLM bfloat16": ("vLLM", "bfloat16"),
}


def measured(
    contestant: str, tokens_per_s: float, number: int = 1, setting: str = "s", session: int = 1, **figures
) -> Repetition:
    family, precision = FAMILIES[contestant]
    of = Figures(tokens_per_s=tokens_per_s, requests=64, **figures)
    return Repetition(session, contestant, family, precision, setting, "run", "256x64", 32, number, of)


def results(*repetitions: Repetition) -> Results:
    sessions = [Session(number, "now", False, {}) for number in (1, 2)]
    return Results(sessions, list(repetitions))


def judged(*repetitions: Repetition) -> dict[str, tuple[float, str]]:
    return {each.aim.name: (each.ratio, each.verdict) for each in judge(results(*repetitions).rows())}


THROUGHPUT = "output tokens/s at concurrency 32"
GAPS = "p99 inter-token latency at concurrency 32, 1 prefill + 1 decode"
OURS = "Diptych 1+1 int8 Q4_1"


def test_ratios_are_to_the_better_peer_by_the_better_layout():
    rows = (
        measured(OURS, 300.0),
        measured("Diptych both int8 Q4_1", 400.0),
        measured("llama.cpp Q4_1", 80.0),
        measured("vLLM float32", 100.0),
    )
    assert judged(*rows)[THROUGHPUT] == (4.0, "met")


def test_the_gaps_aim_holds_for_one_prefill_and_one_decode_worker():
    rows = (
        measured(OURS, 1.0, itl_p99_ms=100.0),
        measured("Diptych both int8 Q4_1", 1.0, itl_p99_ms=1.0),
        measured("llama.cpp Q4_1", 1.0, itl_p99_ms=1000.0),
    )
    assert judged(*rows)[GAPS] == (0.1, "missed")


def test_peers_are_compared_by_their_measured_setting_and_the_best_that_was_tried_is_told():
    rows = (
        measured(OURS, 1.0, itl_p99_ms=10.0),
        measured("llama.cpp Q4_1", 90.0, itl_p99_ms=1000.0),
        measured("llama.cpp Q4_1", 60.0, TRIAL, "small batches", itl_p99_ms=100.0),
    )
    (gaps,) = [each for each in judge(results(*rows).rows()) if each.aim.name == GAPS]
    assert (gaps.ratio, gaps.verdict, gaps.ratio_to_tried) == (0.01, "met", 0.1)
    assert gaps.tried.setting == "small batches"


def test_weights_of_another_kind_are_told_but_not_what_aims_are_about():
    rows = (measured(OURS, 400.0), measured("vLLM float32", 100.0), measured("vLLM bfloat16", 200.0))
    (throughput,) = judge(results(*rows).rows())
    assert (throughput.ratio, throughput.verdict, throughput.ratio_to_tried) == (4.0, "met", 2.0)


@pytest.mark.parametrize(("ours", "theirs"), [(0, 1), (1, 0)])
def test_nothing_is_won_where_requests_failed(ours, theirs):
    rows = (measured(OURS, 400.0, failed=ours), measured("llama.cpp Q4_1", 10.0, failed=theirs))
    assert judged(*rows)[THROUGHPUT] == (40.0, "no claim")


def test_what_one_side_did_not_measure_is_not_judged():
    assert judged(measured(OURS, 400.0)) == {}


def test_the_fastest_setting_without_failures_is_measured():
    tried = results(
        measured("llama.cpp Q4_1", 50.0, TRIAL, "plain"),
        measured("llama.cpp Q4_1", 70.0, TRIAL, "better"),
        measured("llama.cpp Q4_1", 90.0, TRIAL, "failing", failed=1),
    )
    assert tried.best_setting("llama.cpp", 32) == tried.best_setting("llama.cpp", None) == "better"
    assert tried.best_setting("vLLM", None) is None


def test_rows_are_medians_and_a_full_measurement_replaces_its_trial():
    rows = results(
        measured(OURS, 1.0, TRIAL), *(measured(OURS, rate, number) for number, rate in ((1, 4.0), (2, 6.0)))
    ).rows()
    assert [(row.figures.tokens_per_s, row.repetitions, row.trial) for row in rows] == [(5.0, 2, False)]


def test_figures_of_another_session_are_marked():
    made = tables(results(measured(OURS, 4.0, session=1), measured("vLLM float32", 1.0, session=2)))
    text = "\n".join(table.text() + table.markdown() for table in made)
    assert f"{OURS} †" in text
    assert "vLLM float32 †" not in text


def test_results_survive_their_file(tmp_path: Path):
    kept = results(measured(OURS, 4.0, itl_p99_ms=2.0, problems={"gone": 1}))
    kept.failures.append(Failure(1, "vLLM float32", "no wheel"))
    kept.save(tmp_path / "x" / "cpu.json")
    assert Results.load(tmp_path / "x" / "cpu.json") == kept
    assert kept.has(OURS, "s", "256x64", 32, 1)
    assert not kept.has(OURS, "s", "256x64", 32, 2)


def test_a_full_run_tries_settings_first_and_then_measures_everything_three_times():
    visits = plan(contestants(), (SHORT, LONG, HEADLINE), (1, 8, 32), quick=False)
    trials = [visit.numbers == [TRIAL] for visit in visits]
    assert trials == sorted(trials, reverse=True)
    for contestant in contestants():
        numbers = [n for v in visits if v.contestant == contestant and v.setting is None for n in v.numbers]
        assert sorted(numbers) == [1, 2, 3], contestant.name
    assert {visit.contestant.family for visit in visits if visit.setting} == {
        "llama.cpp",
        "vLLM",
        "transformers",
    }


def test_a_pool_holds_all_sequences_of_the_largest_cell():
    assert blocks_for([cell(SHORT, 32, quick=False), cell(LONG, 8, quick=False)]) * 16 > 32 * SHORT.tokens
