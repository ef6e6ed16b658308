"""One turn of a contestant: its server is started, warmed up and measured, and everything is written down."""

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tests.bench.cpu.client import Taken, Target, put_load
from tests.bench.cpu.contestant import Contestant, Setting
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import Cell
from tests.bench.cpu.noise import measure_noise
from tests.bench.cpu.processes import PeerFailed, memory_mib
from tests.bench.cpu.results import Failure, Repetition, Results, Weather
from tests.bench.cpu.transformers_generate import TransformersGenerate

WARM_UP_REQUESTS = 8
WARM_UP_ANSWER_TOKENS = 8
WARM_UP_LIMIT_S = 60.0

AnyContestant = Contestant | TransformersGenerate
Choose = Callable[[Cell], Setting]


@dataclass(frozen=True, slots=True)
class Visit:
    contestant: AnyContestant
    cells: Sequence[Cell]
    numbers: Sequence[int]  # of the repetitions
    setting: Setting | None = None  # None: the best of those tried


class Notebook:
    """Results that are saved whenever something is added."""

    def __init__(self, results: Results, path: Path, logs: Path) -> None:
        self.results, self.logs = results, logs
        self._path = path
        self.session = results.sessions[-1].number

    def has(self, contestant: AnyContestant, setting: Setting, cell: Cell, number: int) -> bool:
        return self.results.has(contestant.name, setting.name, str(cell.shape), cell.concurrency, number)

    def log(self, contestant: AnyContestant) -> Path:
        return self.logs / f"{contestant.name.replace(' ', '-')}.log"

    def best(self, contestant: AnyContestant, concurrency: int | None) -> Setting:
        name = self.results.best_setting(contestant.family, concurrency)
        return next((s for s in contestant.settings if s.name == name), contestant.settings[0])

    def measured(
        self,
        contestant: AnyContestant,
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

    def weather(self, contestant: AnyContestant) -> None:
        noise = measure_noise()
        self.results.weather.append(Weather(self.session, contestant.name, noise))
        print(f"{contestant.name}: {noise}", flush=True)

    def failed(self, contestant: AnyContestant, error: Exception) -> None:
        print(f"{contestant.name} FAILED: {error}", file=sys.stderr, flush=True)
        self.results.failures.append(Failure(self.session, contestant.name, str(error)))
        self.results.save(self._path)


def make(visit: Visit, notebook: Notebook) -> None:
    """What the notebook has already is left out. A contestant's failure is written down, not raised."""
    contestant = visit.contestant
    starts = [*_starts(visit, notebook)]
    if not starts:
        return
    notebook.weather(contestant)
    for setting, cells in starts:
        try:
            if isinstance(contestant, TransformersGenerate):
                _generate(contestant, setting, cells, visit.numbers, notebook)
            else:
                _serve(contestant, setting, cells, visit.numbers, notebook)
        except PeerFailed as error:
            notebook.failed(contestant, error)


def _starts(visit: Visit, notebook: Notebook) -> Iterator[tuple[Setting, list[Cell]]]:
    """What each start of the server measures."""
    contestant = visit.contestant

    def setting(cell: Cell) -> Setting:
        slow = not isinstance(contestant, TransformersGenerate) and contestant.starts_slowly
        return visit.setting or notebook.best(contestant, None if slow else cell.concurrency)

    def start(cell: Cell) -> str:
        group = cell if isinstance(contestant, TransformersGenerate) else contestant.group(cell)
        return f"{setting(cell).name} {group}"

    for _, cells in groupby(sorted(visit.cells, key=start), key=start):
        missing = [
            cell
            for cell in cells
            if not all(notebook.has(contestant, setting(cell), cell, number) for number in visit.numbers)
        ]
        if missing:
            yield setting(missing[0]), sorted(missing, key=lambda cell: cell.concurrency)


def _serve(
    contestant: Contestant,
    setting: Setting,
    cells: Sequence[Cell],
    numbers: Sequence[int],
    notebook: Notebook,
) -> None:
    log = notebook.log(contestant)
    with contestant.serve(setting, cells, log) as served:
        for cell in cells:
            _warm_up(served.target, cell)
            for number in numbers:
                if not notebook.has(contestant, setting, cell, number):
                    taken = asyncio.run(_load(served.target, cell, str(number)))
                    figures = Figures.of(taken, memory_mib(served.pids))
                    notebook.measured(contestant, setting, served.command, cell, number, figures)


def _generate(
    contestant: TransformersGenerate,
    setting: Setting,
    cells: Sequence[Cell],
    numbers: Sequence[int],
    notebook: Notebook,
) -> None:
    for cell in cells:
        for number in numbers:
            if not notebook.has(contestant, setting, cell, number):
                figures, command = contestant.measure(setting, cell, str(number), notebook.log(contestant))
                notebook.measured(contestant, setting, command, cell, number, figures)


def _warm_up(target: Target, cell: Cell) -> None:
    few = Cell(cell.shape, cell.concurrency, min(cell.concurrency, WARM_UP_REQUESTS), WARM_UP_LIMIT_S)
    asyncio.run(put_load(target, few.prompts("warm-up"), WARM_UP_ANSWER_TOKENS, few.requests, few.limit_s))


async def _load(target: Target, cell: Cell, repetition: str) -> Taken:
    prompts, answer_tokens = cell.prompts(repetition), cell.shape.answer_tokens
    return await put_load(target, prompts, answer_tokens, cell.concurrency, cell.limit_s)


def progress(contestant: AnyContestant, setting: Setting, cell: Cell, number: int, figures: Figures) -> str:
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
