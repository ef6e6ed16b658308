"""The results as tables, in text and in Markdown: one list of columns and cells, written in two ways."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.cpu.aims import Judged, judge
from tests.bench.cpu.contestant import COMPARED
from tests.bench.cpu.load import Shape
from tests.bench.cpu.results import Results, Row

FAMILIES = ("Diptych", "llama.cpp", "vLLM", "transformers")


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.lines, strict=True)]
        lines = [self._aligned(line, widths) for line in (self.columns, *self.lines)] if self.lines else []
        return "\n".join([f"\n{self.title}", *lines, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        rule = ["---", *("---:" for _ in self.columns[1:])]
        shown = (self.columns, rule, *self.lines) if self.lines else ()
        lines = [f"| {' | '.join(line)} |" for line in shown]
        return "\n".join([f"## {self.title}", "", *lines, "", *(f"- {note}" for note in self.notes), ""])

    @staticmethod
    def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
        first, *others = (
            text.ljust(width) if not number else text.rjust(width)
            for number, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()


def tables(results: Results) -> list[Table]:
    rows = results.rows()
    full = [row for row in rows if not row.trial]
    shapes = sorted({row.shape for row in full}, key=lambda name: (name == "16x128", Shape.of(name).tokens))
    mark = _Mark(results)
    made = [*(_speeds(full, shape, mark) for shape in shapes), _equal(full, mark)]
    made += [_settings(rows, mark), _weather(results), _aims(judge(rows), mark)]
    return [table for table in made if table.lines or table.notes]


class _Mark:
    """A dagger for what another session than the newest measured."""

    def __init__(self, results: Results) -> None:
        self._newest = max((session.number for session in results.sessions), default=0)

    def __call__(self, row: Row) -> str:
        return "" if row.sessions == (self._newest,) else " †"


def _speeds(rows: Sequence[Row], shape: str, mark: _Mark) -> Table:
    found = [row for row in rows if row.shape == shape]
    found.sort(key=lambda row: (row.concurrency, FAMILIES.index(row.family), row.precision, row.contestant))
    columns = (
        "server",
        "clients",
        "tokens/s",
        "TTFT ms",
        "TPOT ms",
        "p99 ITL ms",
        "tokens/event",
        "MiB",
        "failed",
    )
    lines = [
        [
            row.contestant + mark(row),
            str(row.concurrency),
            _number(row.figures.tokens_per_s, 1),
            _number(row.figures.ttft_ms),
            _number(row.figures.tpot_ms, 1),
            _number(row.figures.itl_p99_ms),
            _number(row.figures.tokens_per_event, 2),
            _number(row.figures.memory_mib),
            _failed(row),
        ]
        for row in found
    ]
    prompt, answer = shape.split("x")
    problems = [
        f"{row.contestant}, {row.concurrency} clients: {count} failed: {what}"
        for row in found
        for what, count in row.figures.problems.items()
    ]
    return Table(f"{prompt} tokens in, {answer} out", columns, lines, problems)


def _equal(rows: Sequence[Row], mark: _Mark) -> Table:
    """Ours beside each peer's of the same precision, 256 tokens in and 64 out."""
    lines = []
    for precision in COMPARED:
        same = [row for row in rows if row.precision == precision and row.shape == "256x64"]
        for concurrency in sorted({row.concurrency for row in same}):
            at_once = [row for row in same if row.concurrency == concurrency]
            ours = _fastest([row for row in at_once if row.family == "Diptych"])
            theirs = [row for row in at_once if row.family != "Diptych"]
            lines += [_pair(precision, ours, peer, mark) for peer in theirs if ours is not None]
    columns = (
        "weights",
        "clients",
        "ours",
        "tokens/s",
        "peer",
        "tokens/s",
        "ratio",
        "TTFT ratio",
        "TPOT ratio",
    )
    return Table("Equal precision, 256 tokens in and 64 out", columns, lines)


def _fastest(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row.figures.tokens_per_s, default=None)


def _pair(precision: str, ours: Row, peer: Row, mark: _Mark) -> list[str]:
    failed = " (failed requests)" if peer.figures.failed or ours.figures.failed else ""
    return [
        precision,
        str(ours.concurrency),
        ours.contestant + mark(ours),
        _number(ours.figures.tokens_per_s, 1),
        peer.contestant + mark(peer),
        _number(peer.figures.tokens_per_s, 1),
        _ratio(ours.figures.tokens_per_s, peer.figures.tokens_per_s) + failed,
        _ratio(ours.figures.ttft_ms, peer.figures.ttft_ms),
        _ratio(ours.figures.tpot_ms, peer.figures.tpot_ms),
    ]


def _aims(judged: Sequence[Judged], mark: _Mark) -> Table:
    lines = []
    for each in judged:
        sign = "at least" if each.aim.direction == "at_least" else "at most"
        values = [_number(each.aim.figure(row.figures), 1) for row in (each.ours, each.theirs)]
        lines.append(
            [
                each.aim.name,
                _ratio_text(each.ratio),
                f"{sign} {each.aim.bound:.3g}",
                each.verdict + (f" ({each.why_no_claim})" if each.why_no_claim else ""),
                f"{each.ours.contestant}: {values[0]}{mark(each.ours)}",
                f"{each.theirs.contestant} ({each.theirs.setting}): {values[1]}{mark(each.theirs)}",
                "-" if each.tried == each.theirs else _tried(each),
            ]
        )
    notes = (
        ["† measured by another start of the benchmark than the last one"] if _any_mark(judged, mark) else []
    )
    columns = ("aim", "ratio", "wanted", "verdict", "ours", "the better peer", "to the best of all tried")
    return Table("Aims", columns, lines, notes)


def _tried(each: Judged) -> str:
    return f"{_ratio_text(each.ratio_to_tried)} ({each.tried.contestant}, {each.tried.setting})"


def _any_mark(judged: Sequence[Judged], mark: _Mark) -> bool:
    return any(mark(row) for each in judged for row in (each.ours, each.theirs))


def _settings(rows: Sequence[Row], mark: _Mark) -> Table:
    """Every way in which each contestant was run, and its whole command line."""
    commands = dict.fromkeys((row.contestant, row.setting, row.command) for row in rows)
    several = {row.contestant for row in rows if row.trial}
    lines = [
        [
            row.contestant + mark(row),
            row.setting,
            str(row.concurrency),
            _number(row.figures.tokens_per_s, 1),
            _number(row.figures.ttft_ms),
            _number(row.figures.itl_p99_ms),
            "tried" if row.trial else f"measured {row.repetitions} times",
        ]
        for row in rows
        if row.contestant in several and row.shape in ("256x64", "16x128")
    ]
    notes = [f"{contestant}, {setting}: `{command}`" for contestant, setting, command in commands]
    columns = ("server", "setting", "clients", "tokens/s", "TTFT ms", "p99 ITL ms", "")
    return Table("Settings and command lines", columns, lines, notes)


def _weather(results: Results) -> Table:
    lines = [
        [
            each.contestant,
            f"{each.noise.hash_mb_per_s:,.0f}",
            f"{each.noise.hash_worst:,.0f}",
            f"{each.noise.copy_gb_per_s:.1f}",
        ]
        for each in results.weather
    ]
    columns = ("before", "SHA-256 MB/s, all cores", "slowest round", "copy GB/s")
    failures = [f"{each.contestant}: {each.what}" for each in results.failures]
    return Table("The machine's noise, and what did not run", columns, lines, failures)


def heading(results: Results) -> list[str]:
    return [
        f"start {session.number}, {session.begun_at}{', quick' if session.quick else ''}: "
        + ", ".join(f"{name} {value}" for name, value in session.machine.items())
        for session in results.sessions
    ]


def _failed(row: Row) -> str:
    return f"{row.figures.failed} of {row.figures.requests}" if row.figures.failed else "0"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else "-"
