"""`diptych status`: the workers of a cluster, what they do and how full they are."""

import argparse
import json
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.core.pairing import unpaired
from services.core.worker_report import WorkerReport
from services.launch.reports import add_source_flags, read_reports

LEGEND = "queued: prompt tokens; used, cached, all: KV blocks; hits: cached prompt tokens"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("status", help="show the workers of a cluster", description=__doc__)
    add_source_flags(parser)
    parser.add_argument("--json", action="store_true", help="print all that the workers report, as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    reports = read_reports(arguments)
    if arguments.json:
        print(json.dumps([{**msgspec.to_builtins(report), **shares(report)} for report in reports], indent=2))
    elif reports:
        Console().print(table(reports))
        print(LEGEND)
        for worker, why in unpaired(reports).items():
            print(f"{worker} shares no request with another worker: {why}")
    else:
        print("no worker is alive")
    return 0


def shares(report: WorkerReport) -> dict[str, Any]:
    """Figures that follow from a report: blocks in use, and the share of prompt tokens found in cache."""
    hit_rate = report.prefix_hit_tokens / report.prompt_tokens if report.prompt_tokens else None
    blocks_used = report.blocks_total - report.blocks_free - report.blocks_cached
    return {"blocks_used": blocks_used, "prefix_hit_rate": hit_rate}


def table(reports: list[WorkerReport]) -> Table:
    """A row per worker, narrow enough for 80 columns; `--json` has the rest."""
    result = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("worker", "role", "state"):
        result.add_column(heading, no_wrap=True)
    for heading in ("running", "waiting", "queued", "used", "cached", "all", "hits"):
        result.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        figures = shares(report)
        load = (report.running, report.waiting, report.queued_prefill_tokens)
        blocks = (figures["blocks_used"], report.blocks_cached, report.blocks_total)
        hits = "-" if figures["prefix_hit_rate"] is None else f"{figures['prefix_hit_rate']:.0%}"
        result.add_row(escape(report.worker_id), report.role, report.state, *map(str, (*load, *blocks)), hits)
    return result
