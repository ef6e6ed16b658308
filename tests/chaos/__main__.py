"""Chaos: a real cluster under load while its parts are killed, stopped and drained at random.

    python -m tests.chaos --seconds 600 --json report.json

Prints what it found; the exit code is 1 if a request failed, an answer was wrong or something was left.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from services.model.pull import ensure_default_model
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.run import TWO_AND_TWO, ChaosPlan, run_chaos
from tests.support.cluster import RunningCluster


def main() -> int:
    given = parse_arguments()
    model = ensure_default_model()
    home = Path(tempfile.mkdtemp(prefix="diptych-chaos-")) / "home"
    plan = ChaosPlan(
        seconds=given.seconds,
        seed=given.seed,
        clients=given.clients,
        fault_every_s=given.every,
        pool=given.pool,
        faults=_faults(given.only),
        say=_say,
    )
    _say(f"seed {plan.seed}; logs in {home}")
    cluster = RunningCluster(replace(TWO_AND_TWO, transports=given.transports), model, home)
    try:
        report = asyncio.run(run_chaos(cluster, plan))
    finally:
        cluster.stop()
    print(report)
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return 1 if report.violations else 0


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def _faults(only: str) -> tuple[Fault, ...]:
    """The faults whose names hold one of the comma-separated words."""
    words = only.split(",")
    return tuple(fault for fault in FAULTS if any(word in str(fault) for word in words))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S", help="(default: %(default)g)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other requests and faults")
    parser.add_argument("--clients", type=int, default=6, help="at once (default: %(default)s)")
    parser.add_argument("--every", type=float, default=4.0, metavar="S", help="between faults, on average")
    parser.add_argument("--pool", type=int, default=60, metavar="N", help="different requests")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults named so, as kill,valkey")
    parser.add_argument(
        "--transports", default=TWO_AND_TWO.transports, metavar="NAMES", help="of KV (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
