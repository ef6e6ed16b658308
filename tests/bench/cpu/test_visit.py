"""Turns of a contestant without a server: which settings are measured, and what a resumed run leaves out."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.cpu.contestant import Family, Precision, Setting
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import SHORT, Cell
from tests.bench.cpu.noise import Noise
from tests.bench.cpu.plan import plan
from tests.bench.cpu.processes import PeerFailed
from tests.bench.cpu.results import TRIAL, Results, Session
from tests.bench.cpu.visit import Notebook, make

SLOW, FAST, BROKEN = Setting("slow"), Setting("fast"), Setting("broken")
RATES = {"slow": 1.0, "fast": 2.0}


@dataclass
class Twin:
    """Answers at the rate of its setting, at once. `asked`: setting, concurrency and repetition, in order."""

    settings: Sequence[Setting]
    name: str = "llama.cpp Q4_1"
    family: Family = "llama.cpp"
    precision: Precision = "4 bits"
    starts_slowly: bool = False
    asked: list[tuple[str, int, str]] = field(default_factory=list)

    def prepare(self) -> None:
        pass

    def group(self, cell: Cell) -> Hashable:
        return cell

    @contextmanager
    def open(self, setting: Setting, cells: Sequence[Cell], log: Path) -> Iterator["TwinOpened"]:
        if setting is BROKEN:
            raise PeerFailed("does not start")
        yield TwinOpened(self, setting)


@dataclass
class TwinOpened:
    twin: Twin
    setting: Setting
    command: str = "run"

    def warm_up(self, cell: Cell) -> None:
        pass

    def measure(self, cell: Cell, repetition: str) -> Figures:
        self.twin.asked.append((self.setting.name, cell.concurrency, repetition))
        return Figures(RATES[self.setting.name], requests=cell.requests)


def run(twin: Twin, results: Results, folder: Path) -> None:
    notebook = Notebook(results, folder / "cpu.json", folder / "logs", lambda: Noise(1.0, 1.0, 1.0))
    for visit in plan([twin], [SHORT], [1, 8], quick=False):
        make(visit, notebook)


def test_settings_are_tried_and_the_best_is_measured_three_times(tmp_path: Path):
    twin, results = Twin([SLOW, FAST]), Results([Session(1, "now", False, {})])
    run(twin, results, tmp_path)
    assert twin.asked[:4] == [("slow", 1, "0"), ("slow", 8, "0"), ("fast", 1, "0"), ("fast", 8, "0")]
    assert sorted(twin.asked[4:]) == sorted(("fast", c, str(n)) for c in (1, 8) for n in (1, 2, 3))
    assert Results.load(tmp_path / "cpu.json") == results


def test_a_resumed_run_measures_only_what_is_missing(tmp_path: Path):
    results = Results([Session(1, "now", False, {})])
    run(Twin([SLOW, FAST]), results, tmp_path)
    lost = results.repetitions.pop()
    results.sessions.append(Session(2, "later", False, {}))
    again = Twin([SLOW, FAST])
    run(again, results, tmp_path)
    assert again.asked == [("fast", lost.concurrency, str(lost.number))]
    assert results.repetitions[-1].session == 2


def test_a_setting_that_does_not_start_is_written_down_and_the_others_go_on(tmp_path: Path):
    twin, results = Twin([BROKEN, SLOW]), Results([Session(1, "now", False, {})])
    run(twin, results, tmp_path)
    assert {failure.what for failure in results.failures} == {"does not start"}
    assert {r.setting for r in results.repetitions if r.number != TRIAL} == {"slow"}
