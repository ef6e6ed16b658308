"""One turn of a contestant: its server is started, warmed up and measured, and everything is written down."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tests.bench.cpu.contestant import Contestant, Setting
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import Cell
from tests.bench.cpu.noise import Noise, measure_noise
from tests.bench.cpu.processes import PeerFailed
from tests.bench.cpu.results import Failure, Repetition, Results, Weather


@dataclass(frozen=True, slots=True)
class Visit:
    contestant: Contestant
    cells: Sequence[Cell]
    numbers: Sequence[int]  # of the repetitions
    setting: Setting | None = None  # None: the best of those tried


class Notebook:
    """Results that are saved whenever something is added. `noise` measures the machine's."""

    def __init__(
        self, results: Results, path: Path, logs: Path, noise: Callable[[], Noise] = measure_noise
    ) -> None:
        self.results, self.logs, self._noise = results, logs, noise
        self._path = path
        self.session = results.sessions[-1].number

    def has(self, contestant: Contestant, setting: Setting, cell: Cell, number: int) -> bool:
        return self.results.has(contestant.name, setting.name, str(cell.shape), cell.concurrency, number)

    def log(self, contestant: Contestant) -> Path:
        return self.logs / f"{contestant.name.replace(' ', '-')}.log"

    def best(self, contestant: Contestant, concurrency: int | None) -> Setting:
        name = self.results.best_setting(contestant.family, concurrency)
        return next((s for s in contestant.settings if s.name == name), contestant.settings[0])

    def measured(
        self,
        contestant: Contestant,
        setting: Setting,
        command: str,
        cell: Cell,
        number: int,
        figures: Figures,
    ) -> None:
        self.results.repetitions.append(
            Repetition(
                self.session,
                contestant.name,
                contestant.family,
                contestant.precision,
                setting.name,
                command,
                str(cell.shape),
                cell.concurrency,
                number,
                figures,
            )
        )
        self.results.save(self._path)
        print(progress(contestant, setting, cell, number, figures), flush=True)

    def weather(self, contestant: Contestant) -> None:
        noise = self._noise()
        self.results.weather.append(Weather(self.session, contestant.name, noise))
        print(f"{contestant.name}: {noise}", flush=True)

    def failed(self, contestant: Contestant, error: Exception) -> None:
        print(f"{contestant.name} FAILED: {error}", file=sys.stderr, flush=True)
        self.results.failures.append(Failure(self.session, contestant.name, str(error)))
        self.results.save(self._path)


def make(visit: Visit, notebook: Notebook) -> None:
    """What the notebook has already is left out. A contestant's failure is written down, not raised."""
    starts = [*_starts(visit, notebook)]
    if starts:
        notebook.weather(visit.contestant)
    for setting, cells in starts:
        try:
            _measure(visit, setting, cells, notebook)
        except PeerFailed as error:
            notebook.failed(visit.contestant, error)


def _starts(visit: Visit, notebook: Notebook) -> Iterator[tuple[Setting, list[Cell]]]:
    """What each start of the contestant measures."""
    contestant = visit.contestant

    def setting(cell: Cell) -> Setting:
        concurrency = None if contestant.starts_slowly else cell.concurrency
        return visit.setting or notebook.best(contestant, concurrency)

    def start(cell: Cell) -> str:
        return f"{setting(cell).name} {contestant.group(cell)}"

    for _, cells in groupby(sorted(visit.cells, key=start), key=start):
        missing = [cell for cell in cells if [*_missing(visit, setting(cell), cell, notebook)]]
        if missing:
            yield setting(missing[0]), sorted(missing, key=lambda cell: cell.concurrency)


def _missing(visit: Visit, setting: Setting, cell: Cell, notebook: Notebook) -> Iterator[int]:
    return (number for number in visit.numbers if not notebook.has(visit.contestant, setting, cell, number))


def _measure(visit: Visit, setting: Setting, cells: Sequence[Cell], notebook: Notebook) -> None:
    contestant = visit.contestant
    with contestant.open(setting, cells, notebook.log(contestant)) as opened:
        for cell in cells:
            opened.warm_up(cell)
            for number in [*_missing(visit, setting, cell, notebook)]:
                figures = opened.measure(cell, str(number))
                notebook.measured(contestant, setting, opened.command, cell, number, figures)


def progress(contestant: Contestant, setting: Setting, cell: Cell, number: int, figures: Figures) -> str:
    what = f"{'trial' if not number else f'round {number}'}: {contestant.name} ({setting.name})"
    latency = "".join(
        f"  {name} {value:,.0f} ms"
        for name, value in (
            ("TTFT", figures.ttft_ms),
            ("TPOT", figures.tpot_ms),
            ("p99 ITL", figures.itl_p99_ms),
        )
        if value is not None
    )
    failed = f"  FAILED {figures.failed} of {figures.requests}: {figures.problems}" if figures.failed else ""
    return (
        f"{what:64} {cell.shape} c={cell.concurrency:<3} {figures.tokens_per_s:7.1f} tok/s{latency}{failed}"
    )
