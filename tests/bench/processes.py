"""Whose cores a whole server takes: the processor time of each of its processes, for each token it gives.

    python -m tests.bench.processes [--layout 1+1|both] [--shape 256x64] [--concurrency 1,8,32] [--flags ...]

The server and the client are those of `make bench-cpu`. Engines compute; everything else of the server is
what moving prompts, KV and tokens costs.
"""

import argparse
import glob
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.bench.cpu.contestant import Setting, bench_home
from tests.bench.cpu.diptych import Diptych
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import Shape, cell
from tests.bench.cpu.processes import family_of
from tests.bench.cpu.served import Served

ENGINE = "services.engine.process"
CLIENT = "client"


def part_of(command: Sequence[str], parent: Sequence[str]) -> str | None:
    """What a process of the server is called, whose parent is needed too; None: it does nothing here."""
    if ENGINE in command:
        return f"{part_of(parent, ())} engine"
    if "worker" in command:
        return command[command.index("--role") + 1]
    if "gateway" in command:
        return "gateway"
    # It titles itself: program and address are one word. A process that has ended has no words.
    return "valkey" if command and "valkey-server" in command[0] else None


def shares(seconds: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Microseconds for each token, and what of the server's time is the engines'."""
    server = {part: taken for part, taken in seconds.items() if part != CLIENT}
    engines = sum(taken for part, taken in server.items() if part.endswith(" engine"))
    each = {part: 1e6 * taken / tokens for part, taken in seconds.items()}
    return each | {"engines' share": engines / sum(server.values())}


def parts(served: Served) -> dict[str, int]:
    """The process of each part; of a gateway's children only itself."""
    found = {CLIENT: os.getpid()}
    for process in _family(served):
        with suppress(psutil.NoSuchProcess):
            above = process.parent()
            if part := part_of(process.cmdline(), above.cmdline() if above else ()):
                found.setdefault(part, process.pid)
    return found


def cpu_s(pid: int) -> float:
    """Of all its threads that live. /proc/PID/stat counts in hundredths of a second."""
    tasks = glob.glob(f"/proc/{pid}/task/*/schedstat")
    return sum(int(Path(task).read_text().split()[0]) for task in tasks) / 1e9


def _family(served: Served) -> Iterator[psutil.Process]:
    for pid in served.pids:
        yield from family_of(pid)


def measure(served: Served, shape: Shape, concurrency: int) -> tuple[Figures, dict[str, float]]:
    load = cell(shape, concurrency, quick=False)
    served.warm_up(load)
    pids = parts(served)
    before = {part: cpu_s(pid) for part, pid in pids.items()}
    figures = served.measure(load, f"processes {concurrency}")
    taken = {part: cpu_s(pid) - before[part] for part, pid in pids.items()}
    return figures, shares(taken, (figures.requests - figures.failed) * shape.answer_tokens)


def main() -> None:
    given = _arguments()
    cells = [cell(given.shape, concurrency, quick=False) for concurrency in given.concurrency]
    setting = Setting("as given", flags=tuple(shlex.split(given.flags)))
    log = bench_home() / "logs" / "processes.log"
    with Diptych(given.layout, "Q4_1").open(setting, cells, log) as served:
        for concurrency in given.concurrency:
            figures, each = measure(served, given.shape, concurrency)
            print(
                f"\n{given.layout}, {given.shape}, {concurrency} at a time: {figures.failed} failed,", end=" "
            )
            print(f"{figures.tokens_per_s:.0f} tokens/s, first token {figures.ttft_ms:.0f} ms,", end=" ")
            print(f"then {figures.tpot_ms:.1f}, p99 between two {figures.itl_p99_ms:.0f} ms")
            for part, taken in each.items():
                unit = f"{taken:10.0%}" if part == "engines' share" else f"{taken:10.0f} us a token"
                print(f"  {part:20s}{unit}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=["1+1", "both"], default="1+1")
    parser.add_argument("--shape", type=Shape.of, default="256x64", help="tokens in and out")
    parser.add_argument(
        "--concurrency", type=lambda text: [int(one) for one in text.split(",")], default="1,8,32"
    )
    parser.add_argument("--flags", default="", help="more options for `diptych up`, or the worker of both")
    return parser.parse_args()


if __name__ == "__main__":
    main()
