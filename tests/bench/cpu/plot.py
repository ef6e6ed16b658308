"""The results as a picture: a row of panels for each shape, a group of bars for each concurrency."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from tests.bench.cpu.figures import Figures
from tests.bench.cpu.results import Row

PANELS: Sequence[tuple[str, Callable[[Figures], float | None], bool]] = (
    ("output tokens/s (more is better)", lambda figures: figures.tokens_per_s, False),
    ("time to first token, ms (log)", lambda figures: figures.ttft_ms, True),
    ("time per output token, ms (log)", lambda figures: figures.tpot_ms, True),
    ("p99 inter-token latency, ms (log)", lambda figures: figures.itl_p99_ms, True),
)
COLOURS = {
    "Diptych": ("#0b5fa5", "#3f8fd2", "#66a9dc", "#9cc8ea", "#c6dff3"),
    "llama.cpp": ("#a8480f", "#d0692a", "#e99a66", "#f6cdb0"),
    "vLLM": ("#4d8c3f", "#93c287"),
}
BARS_WIDTH = 0.84  # of the distance between two groups


def draw(rows: Sequence[Row], path: Path) -> None:
    """`rows`: of servers, measured in full. Writes a PNG."""
    served = [row for row in rows if row.family in COLOURS and row.shape != "16x128"]
    shapes = list(dict.fromkeys(row.shape for row in served))
    if not shapes:
        return
    figure, grid = plt.subplots(
        len(shapes), len(PANELS), figsize=(5.2 * len(PANELS), 4.2 * len(shapes) + 1.2), squeeze=False
    )
    names = _in_order(served)
    for line, shape in zip(grid, shapes, strict=True):
        for axes, (title, value, logarithmic) in zip(line, PANELS, strict=True):
            _panel(axes, [row for row in served if row.shape == shape], names, value)
            axes.set_yscale("log" if logarithmic else "linear")
            prompt, answer = shape.split("x")
            axes.set_title(f"{title}\n{prompt} tokens in, {answer} out", fontsize=10)
    handles = [Patch(color=colour) for colour in names.values()]
    figure.legend(handles, names, loc="lower center", ncols=min(len(names), 5), frameon=False, fontsize=9)
    figure.suptitle("SmolLM2-135M on one CPU: medians, the best setting of each server; × = failed requests")
    figure.tight_layout(rect=(0, 0.12 / len(shapes), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _in_order(rows: Sequence[Row]) -> dict[str, str]:
    """Contestants and their colours, by family."""
    return {
        name: colours[number % len(colours)]
        for family, colours in COLOURS.items()
        for number, name in enumerate(dict.fromkeys(row.contestant for row in rows if row.family == family))
    }


def _panel(
    axes: Axes, rows: Sequence[Row], names: dict[str, str], value: Callable[[Figures], float | None]
) -> None:
    concurrencies = sorted({row.concurrency for row in rows})
    found = {(row.contestant, row.concurrency): row for row in rows}
    width = BARS_WIDTH / max(len(names), 1)
    for number, (name, colour) in enumerate(names.items()):
        for group, concurrency in enumerate(concurrencies):
            row = found.get((name, concurrency))
            height = value(row.figures) if row else None
            if row is None or height is None:
                continue
            at = group - BARS_WIDTH / 2 + (number + 0.5) * width
            axes.bar(at, height, width * 0.92, color=colour)
            label = f"{height:,.0f}" + (" ×" if row.figures.failed else "")
            axes.annotate(
                label,
                (at, height),
                ha="center",
                va="bottom",
                fontsize=6,
                rotation=90,
                xytext=(0, 2),
                textcoords="offset points",
            )
    axes.set_xticks(range(len(concurrencies)), [f"{c} client{'s' * (c > 1)}" for c in concurrencies])
    axes.margins(y=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
