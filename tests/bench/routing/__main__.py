"""All routing policies over real request traces, in virtual time, side by side.

    python -m tests.bench.routing [--quick] [--gateways 2] [--data FOLDER] [--json FILE] [--plot FILE]

The router, the gateway's view of the cluster, the prefix index, and each worker's scheduler, block pool and
step model are the production code. Steps of the model take the time that they were measured to take
(step_times.json), with noise; reports reach the router 250 ms old. A seed picks the window of the trace, the
arrivals within its ticks, and the noise; all policies of a seed see the same requests, and are compared
seed by seed. Ratios above 1 mean that `cost` is better; brackets hold 95 % intervals.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.routing.comparison import compare
from tests.bench.routing.experiment import LOADS, POLICIES, Done, Experiment, Plan
from tests.bench.routing.report import draw, print_comparison, write_json
from tests.bench.routing.simulation import ClusterSpec
from tests.bench.routing.step_table import read_table
from tests.bench.routing.traces import TRACES

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT.parent / "shared" / "data"
PROGRESS_S = 10.0
SEEDS, REQUESTS = "6,7,8,9,10", 1500  # the policy `cost` was tuned on others
SEEDS_QUICK, REQUESTS_QUICK = "6,7", 400
WIDTH = 190  # of the tables, where there is no terminal


def main() -> None:
    given = _parse()
    plan = _plan(given)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    errors = Console(stderr=True, highlight=False)
    started_s = time.monotonic()
    with Experiment(plan, given.processes) as experiment:
        errors.print(f"{experiment.size} runs in {given.processes} processes, after a few that set the rates")
        results = _shown(experiment, errors)
    rows = compare(results)
    table = read_table()
    console.print(
        f"{plan.spec.prefill} prefill + {plan.spec.decode} decode workers of {plan.spec.blocks} blocks, "
        f"{table.model}, steps measured on {table.machine} with {table.threads} thread; "
        f"{plan.requests - plan.warm_up} requests after {plan.warm_up} that warm the caches, "
        f"{len(plan.seeds)} seeds"
    )
    print_comparison(rows, console)
    if given.json:
        write_json(rows, _settings(plan), given.json)
    if given.plot:
        draw(rows, given.plot)
    errors.print(f"took {time.monotonic() - started_s:.0f} s")


def _shown(experiment: Experiment, errors: Console) -> list[Done]:
    results: list[Done] = []
    printed_s = time.monotonic()
    for done in experiment.results():
        results.append(done)
        if time.monotonic() - printed_s > PROGRESS_S:
            printed_s = time.monotonic()
            errors.print(f"{len(results)} of {experiment.size} runs")
    return results


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    spec = ClusterSpec()
    parser.add_argument("--quick", action="store_true", help="fewer and smaller runs: under three minutes")
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="FOLDER", help="of the traces (%(default)s)"
    )
    parser.add_argument("--traces", default=",".join(TRACES), help="(%(default)s)")
    parser.add_argument("--policies", default=",".join(POLICIES), help="(%(default)s)")
    parser.add_argument("--loads", default=",".join(LOADS), help="(%(default)s)")
    parser.add_argument("--seeds", default="", metavar="1,2,..", help=f"({SEEDS}; quick: {SEEDS_QUICK})")
    parser.add_argument(
        "--requests", type=int, default=0, metavar="N", help=f"of a run ({REQUESTS}; quick: {REQUESTS_QUICK})"
    )
    parser.add_argument("--prefill", type=int, default=spec.prefill, metavar="N", help="(%(default)s)")
    parser.add_argument("--decode", type=int, default=spec.decode, metavar="N", help="(%(default)s)")
    parser.add_argument("--blocks", type=int, default=spec.blocks, metavar="N", help="a worker (%(default)s)")
    parser.add_argument(
        "--gateways", type=int, default=2, metavar="N", help="compared with one (%(default)s)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there (needs matplotlib)")
    given = parser.parse_args()
    for option, known in (("traces", TRACES), ("policies", POLICIES), ("loads", LOADS)):
        unknown = set(getattr(given, option).split(",")) - set(known)
        if unknown:
            parser.error(f"--{option}: {', '.join(sorted(unknown))}? There are {', '.join(known)}")
    if "cost" not in given.policies.split(","):
        parser.error("--policies must have `cost`, which the others are compared with")
    return given


def _plan(given: argparse.Namespace) -> Plan:
    requests = given.requests or (REQUESTS_QUICK if given.quick else REQUESTS)
    seeds = given.seeds or (SEEDS_QUICK if given.quick else SEEDS)
    return Plan(
        data=given.data,
        traces=tuple(given.traces.split(",")),
        policies=tuple(given.policies.split(",")),
        loads=tuple(given.loads.split(",")),
        seeds=tuple(map(int, seeds.split(","))),
        requests=requests,
        warm_up=requests // 3,
        gateways=given.gateways,
        spec=replace(ClusterSpec(), prefill=given.prefill, decode=given.decode, blocks=given.blocks),
    )


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "traces": plan.traces,
        "policies": plan.policies,
        "loads": {load: LOADS[load] for load in plan.loads},
        "seeds": plan.seeds,
        "requests": plan.requests,
        "warm_up": plan.warm_up,
        "prefill": plan.spec.prefill,
        "decode": plan.spec.decode,
        "blocks": plan.spec.blocks,
    }


if __name__ == "__main__":
    main()
