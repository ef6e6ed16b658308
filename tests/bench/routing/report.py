"""The comparison as tables on a terminal, as JSON and as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.routing.comparison import REFERENCE, Row, worse_than_best
from tests.bench.routing.statistics import Interval

COLUMNS = (
    *("load", "policy", "mean TTFT", "of cost's", "p99 TTFT", "of cost's", "hit rate", "fetched", "alone"),
    *("max/mean work", "busy", "TPOT", "of cost's"),
)


def print_comparison(rows: Sequence[Row], console: Console) -> None:
    for trace in dict.fromkeys(row.trace for row in rows):
        _print_trace(trace, [row for row in rows if row.trace == trace and row.gateways == 1], console)
    for line in gateway_lines(rows):
        console.print(line)
    worse = worse_than_best(rows)
    console.print("No policy is better than cost anywhere." if not worse else "Better than cost:")
    for line in worse:
        console.print(f"  {line}")


def gateway_lines(rows: Sequence[Row]) -> list[str]:
    """How several gateways with one store compare with one gateway."""
    one = {(row.trace, row.load): row for row in rows if row.gateways == 1 and row.policy == REFERENCE}
    return [_gateway_line(row, one[row.trace, row.load]) for row in rows if row.gateways > 1]


def _gateway_line(several: Row, one: Row) -> str:
    change = several.hit_rate / one.hit_rate - 1
    return (
        f"{several.gateways} gateways, {several.trace}, {several.load} load: "
        f"hit rate {several.hit_rate:.1%}, with one gateway {one.hit_rate:.1%} ({change:+.1%}); "
        f"mean TTFT {_ratio(several.ttft_ratio)} of one's"
    )


def write_json(rows: Sequence[Row], settings: dict[str, Any], path: Path) -> None:
    path.write_text(
        json.dumps({"settings": settings, "rows": [row.as_dict() for row in rows]}, indent=1) + "\n"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of mean TTFT over cost's, with their intervals; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: .venv/bin/pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = list(dict.fromkeys(row.trace for row in rows))
    figure, axes = pyplot.subplots(1, len(traces), figsize=(4 * len(traces), 3.4), sharey=True, squeeze=False)
    for axis, trace in zip(axes[0], traces, strict=True):
        _draw_trace(axis, [row for row in rows if row.trace == trace and row.gateways == 1])
        axis.set_title(trace)
    axes[0][0].set_ylabel("mean TTFT / that of cost")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _draw_trace(axis: Any, rows: Sequence[Row]) -> None:
    loads = list(dict.fromkeys(row.load for row in rows))
    policies = [policy for policy in dict.fromkeys(row.policy for row in rows) if policy != REFERENCE]
    width = 0.8 / max(len(policies), 1)
    for place, policy in enumerate(policies):
        ratios = [next(r.ttft_ratio for r in rows if (r.load, r.policy) == (load, policy)) for load in loads]
        offsets = [number + (place - (len(policies) - 1) / 2) * width for number in range(len(loads))]
        errors = [[r.value - r.low for r in ratios], [r.high - r.value for r in ratios]]
        finite = all(error < 1e6 for side in errors for error in side)
        axis.bar(
            offsets,
            [r.value for r in ratios],
            width,
            yerr=errors if finite else None,
            label=policy,
            capsize=2,
        )
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_xticks(range(len(loads)), loads)


def _print_trace(trace: str, rows: Sequence[Row], console: Console) -> None:
    table = Table(title=trace, title_justify="left", title_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("load", "policy") else "right")
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before.load != row.load:
            table.add_section()
        table.add_row(*cells(row))
    console.print(table)


def cells(row: Row) -> list[str]:
    own = row.policy == REFERENCE
    return [
        row.load,
        row.policy,
        f"{row.mean_ttft_s:.2f} s",
        "" if own else _ratio(row.ttft_ratio),
        f"{row.p99_ttft_s:.1f} s",
        "" if own else _ratio(row.p99_ratio),
        f"{row.hit_rate:.1%}",
        f"{row.fetched_share:.1%}",
        f"{row.alone_share:.0%}",
        f"{row.imbalance:.2f}",
        f"{row.utilisation:.0%}",
        f"{row.tpot_ms:.0f} ms",
        "" if own else _ratio(row.tpot_ratio),
    ]


def _ratio(interval: Interval) -> str:
    if interval.high > 1e3:
        return f"×{interval.value:.2f}"
    return f"×{interval.value:.2f} ({interval.low:.2f}–{interval.high:.2f})"
