"""What has been measured so far, in one JSON file: a broken run goes on from it, tables are made of it."""

from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean

import msgspec

from tests.bench.cpu.contestant import Family, Precision
from tests.bench.cpu.figures import Figures, medians
from tests.bench.cpu.noise import Noise

TRIAL = 0  # the repetition that compares a contestant's settings


class Session(msgspec.Struct, frozen=True):
    """One start of the benchmark. Figures of an older one are marked: the machine may have changed."""

    number: int
    begun_at: str
    quick: bool
    machine: dict[str, str]


class Repetition(msgspec.Struct, frozen=True):
    session: int
    contestant: str
    family: Family
    precision: Precision
    setting: str
    command: str
    shape: str
    concurrency: int
    number: int  # TRIAL, or from 1
    figures: Figures


class Weather(msgspec.Struct, frozen=True):
    """The machine's noise before a contestant's turn."""

    session: int
    contestant: str
    noise: Noise


class Failure(msgspec.Struct, frozen=True):
    session: int
    contestant: str
    what: str


class Row(msgspec.Struct, frozen=True):
    """One contestant with one setting in one cell: medians over repetitions, or its trial alone."""

    contestant: str
    family: Family
    precision: Precision
    setting: str
    command: str
    shape: str
    concurrency: int
    figures: Figures
    repetitions: int
    trial: bool
    sessions: tuple[int, ...]


class Results(msgspec.Struct):
    sessions: list[Session] = []
    repetitions: list[Repetition] = []
    weather: list[Weather] = []
    failures: list[Failure] = []

    @classmethod
    def load(cls, path: Path) -> "Results":
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        partial.replace(path)

    def has(self, contestant: str, setting: str, shape: str, concurrency: int, number: int) -> bool:
        return any(
            (r.contestant, r.setting, r.shape, r.concurrency, r.number)
            == (contestant, setting, shape, concurrency, number)
            for r in self.repetitions
        )

    def best_setting(self, family: Family, concurrency: int | None) -> str | None:
        """The fastest in trials at `concurrency`, or over all (None), of those with the fewest failures."""
        trials = [
            r
            for r in self.repetitions
            if r.family == family and r.number == TRIAL and concurrency in (None, r.concurrency)
        ]
        names = dict.fromkeys(r.setting for r in trials)
        scores = {name: _score([r.figures for r in trials if r.setting == name]) for name in names}
        return max(scores, key=lambda name: scores[name]) if scores else None

    def rows(self) -> list[Row]:
        """Measured ones first in each cell; a setting that was measured in full has no row for its trial."""
        keys = dict.fromkeys((r.contestant, r.setting, r.shape, r.concurrency) for r in self.repetitions)
        return [row for key in keys for row in self._row(*key)]

    def _row(self, contestant: str, setting: str, shape: str, concurrency: int) -> Iterator[Row]:
        found = [
            r
            for r in self.repetitions
            if (r.contestant, r.setting, r.shape, r.concurrency) == (contestant, setting, shape, concurrency)
        ]
        taken = [r for r in found if r.number != TRIAL] or found
        first = taken[0]
        yield Row(
            contestant,
            first.family,
            first.precision,
            setting,
            first.command,
            shape,
            concurrency,
            medians([r.figures for r in taken]),
            len(taken),
            first.number == TRIAL,
            tuple(sorted({r.session for r in taken})),
        )


def _score(trials: list[Figures]) -> tuple[int, float]:
    failed = sum(figures.failed for figures in trials)
    return -failed, geometric_mean(max(figures.tokens_per_s, 1e-3) for figures in trials)
