"""Run simulated clusters: `python -m tests.sim --seeds 5000`, or one seed again: `--seed 1234`.

A seed that fails prints one line with the command that replays it, log included.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.sim.simulation import Result, simulate, without_log

_PROGRESS_S = 10.0


def main() -> int:
    arguments = _parse()
    # Sets of strings would else be in another order in every Python process.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    if arguments.seed is not None:
        return _replay(arguments.seed)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    return _run(seeds, arguments.processes)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--processes", type=int, default=1, help="run them in so many processes")
    parser.add_argument("--seed", type=int, help="run this seed alone, and print its log")
    return parser.parse_args()


def _replay(seed: int) -> int:
    result = simulate(seed, verbose=True)
    print(*result.lines, sep="\n")
    print(*result.complaints, sep="\n")
    print(f"seed {seed}: {_counts(result.outcomes)}; trace {result.digest}")
    return bool(result.complaints)


def _run(seeds: range, processes: int) -> int:
    total = Result(-1)
    failed = 0
    printed_s = time.monotonic()
    for done, result in enumerate(_results(seeds, processes), 1):
        _add(total, result)
        if result.complaints:
            failed += 1
            print(f"FAILED  make sim SEED={result.seed}  {result.complaints[0]}", flush=True)
        if time.monotonic() - printed_s > _PROGRESS_S:
            printed_s = time.monotonic()
            print(f"{done} of {len(seeds)} seeds, {failed} failed", flush=True)
    _summarize(total, len(seeds), failed)
    return bool(failed)


def _results(seeds: range, processes: int) -> Iterable[Result]:
    if processes == 1:
        yield from map(without_log, seeds)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(without_log, seeds, chunksize=8)


def _add(total: Result, result: Result) -> None:
    total.requests += result.requests
    total.virtual_s += result.virtual_s
    for name in ("outcomes", "faults", "events"):
        getattr(total, name).update(getattr(result, name))


def _summarize(total: Result, seeds: int, failed: int) -> None:
    print(f"{seeds} seeds, {failed} failed, {total.virtual_s:,.0f} virtual seconds")
    print(f"  {total.requests:,} requests: {_counts(total.outcomes)}")
    print(f"  {sum(total.faults.values()):,} faults: {_counts(total.faults)}")
    print(f"  of it came: {_counts(total.events)}")


def _counts(counter: "Counter[str]") -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counter.most_common())


if __name__ == "__main__":
    sys.exit(main())
