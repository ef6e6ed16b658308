"""Threads and cores: a step with one and two threads, and two workers that share the machine's cores.

    python -m tests.bench.threads [--part steps|workers] [--rounds N] [--seconds N]

`steps` has one process, on a quiet machine and beside a process that spins. `workers` has a prefill and a
decode worker beside each other, in each of the ways to give them cores: a request at a time (a prompt, then
64 steps of one sequence), and both busy all the time. Sides run by turns; medians, because what the others
take is the point.
"""

import argparse
import math
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

from services.core.sampling import SamplingParams
from services.core.usable_cores import usable_cores
from services.engine.device.torch_runner import TorchRunner
from services.engine.messages import SharedCores
from services.engine.runner import Row, Sample
from services.launch.cores import CoreFile
from services.model.files import open_model
from services.model.pull import ensure_default_model

CONTEXT = 256  # tokens of each decoding sequence, and of a prompt
BLOCK_SIZE = 16
BLOCKS = 1024
CHUNK = 128  # prompt tokens of a step
SEQUENCES = (1, 8, 32)
OUTPUT = 64  # tokens of a request's answer
GREEDY = Sample(SamplingParams(max_tokens=1, temperature=0), [], [])


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to give a worker cores."""

    threads: int
    pinned: bool = False  # the main thread of each worker to a core of its own
    nice: int = 0  # of the helpers
    shared: bool = False  # cores of idle workers are borrowed


VARIANTS = {
    "1 thread each": Variant(1),
    "2 threads each": Variant(2),
    "2, main threads pinned": Variant(2, pinned=True),
    "2, helpers nice 10": Variant(2, nice=10),
    "idle cores borrowed": Variant(1, shared=True),
    "borrowed, mains pinned": Variant(1, shared=True, pinned=True),
}


def decoding(count: int) -> list[Row]:
    tables = block_tables(count)
    return [Row([5], CONTEXT - 1, table, [GREEDY]) for table in tables]


def prompt() -> list[list[Row]]:
    """Its chunks."""
    (table,) = block_tables(1)
    return [
        [Row([7] * CHUNK, start, table, [GREEDY] if start + CHUNK == CONTEXT else [])]
        for start in range(0, CONTEXT, CHUNK)
    ]


def block_tables(sequences: int) -> list[list[int]]:
    count = -(-CONTEXT // BLOCK_SIZE)
    shuffled = random.Random(1).sample(range(BLOCKS), sequences * count)
    return [shuffled[index * count : (index + 1) * count] for index in range(sequences)]


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def quantile(times: Sequence[float], share: float) -> float:
    """The smallest of them that so many are not above."""
    return sorted(times)[max(math.ceil(share * len(times)), 1) - 1]


def open_runner(variant: Variant, shared: SharedCores | None = None) -> TorchRunner:
    files = open_model(ensure_default_model())
    geometry = files.config.pool_geometry(BLOCKS, BLOCK_SIZE, "int8")
    return TorchRunner(files, geometry, None, threads=variant.threads, quantization="int8", cores=shared)


@contextmanager
def spinning() -> Iterator[None]:
    """A process that wants a core all the time."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    time.sleep(0.5)
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin() -> None:
    while True:
        pass


def steps(rounds: int) -> None:
    runners = [open_runner(Variant(threads)) for threads in (1, 2)]
    work = {f"{count} decoding": [decoding(count)] for count in SEQUENCES} | {
        f"prompt of {CONTEXT}": prompt()
    }
    places: dict[str, AbstractContextManager[None]] = {
        "quiet": nullcontext(),
        "beside a busy process": spinning(),
    }
    for place, around in places.items():
        print(f"\n{place:24s}   1 thread: best  median      2 threads: best  median     ratio")
        with around:
            for name, batches in work.items():
                print_steps(name, [partial(run_all, runner, batches) for runner in runners], rounds)


def print_steps(name: str, sides: Sequence[Callable[[], object]], rounds: int) -> None:
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, measured in zip(sides, times, strict=True):
            side()
            measured += [timed(side) for _ in range(2)]
    one, two = map(statistics.median, times)
    print(f"{name:24s}{min(times[0]):13.2f}{one:8.2f} ms{min(times[1]):15.2f}{two:8.2f} ms{one / two:7.2f}x")


def run_all(runner: TorchRunner, batches: Sequence[list[Row]]) -> None:
    for rows in batches:
        runner.run(rows)


def work_for(variant: Variant, slot: int, file: str, connection: Connection) -> None:
    """A worker: for each (what, times at least, seconds at least) that it is sent, it answers with times."""
    runner = open_runner(variant, SharedCores(file, slot, usable_cores()) if variant.shared else None)
    place_threads(variant, slot)
    work = {str(count): [decoding(count)] for count in SEQUENCES} | {"prompt": prompt()}
    for batches in work.values():
        run_all(runner, batches)
    connection.send("ready")
    while task := connection.recv():
        what, times, seconds = task
        measured: list[float] = []
        until = time.perf_counter() + seconds
        while len(measured) < times or time.perf_counter() < until:
            measured.append(timed(partial(run_all, runner, work[what])))
        connection.send(measured)


def place_threads(variant: Variant, slot: int) -> None:
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != os.getpid():
            os.setpriority(os.PRIO_PROCESS, thread, variant.nice)
    if variant.pinned:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[slot % usable_cores()]})


class Pair:
    """A prefill and a decode worker, as processes."""

    def __init__(self, variant: Variant) -> None:
        context = multiprocessing.get_context("spawn")
        self._file = CoreFile(2)
        self._connections = []
        for slot in range(2):
            ours, theirs = context.Pipe()
            arguments = (variant, slot, str(self._file.path), theirs)
            context.Process(target=work_for, args=arguments, daemon=True).start()
            self._connections.append(ours)
        for connection in self._connections:
            connection.recv()

    def request(self) -> tuple[float, float]:
        """Milliseconds of the first token, and of each of the others."""
        (first,), others = (self._ask(0, "prompt", 1), self._ask(1, "1", OUTPUT))
        return first, statistics.mean(others)

    def both(self, sequences: int, seconds: float) -> tuple[list[float], list[float]]:
        """Milliseconds of prompts and of steps, side by side."""
        for connection, what in zip(self._connections, ("prompt", str(sequences)), strict=True):
            connection.send((what, 1, seconds))
        prompts, steps = (connection.recv() for connection in self._connections)
        return prompts, steps

    def end(self) -> None:
        for connection in self._connections:
            connection.send(None)
        self._file.close()

    def _ask(self, worker: int, what: str, times: int) -> list[float]:
        self._connections[worker].send((what, times, 0.0))
        measured: list[float] = self._connections[worker].recv()
        return measured


def workers(rounds: int, seconds: float) -> None:
    pairs = {name: Pair(variant) for name, variant in VARIANTS.items()}
    requests: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    busy: dict[tuple[int, str], tuple[list[float], list[float]]] = {
        (count, name): ([], []) for count in SEQUENCES for name in pairs
    }
    for _ in range(rounds):
        for name, pair in pairs.items():
            pair.request()
            requests[name] += [pair.request() for _ in range(2)]
            for count in SEQUENCES:
                for times, more in zip(busy[count, name], pair.both(count, seconds), strict=True):
                    times += more
    for pair in pairs.values():
        pair.end()
    print(f"\n{'a request at a time':28s}{'first token':>14s}{'each other':>13s}{'whole':>9s}")
    for name, both in requests.items():
        first, other = (statistics.median(column) for column in zip(*both, strict=True))
        print(f"{name:28s}{first:11.1f} ms{other:10.2f} ms{first + OUTPUT * other:6.0f} ms")
    print(f"\n{'both busy':40s}{'prompts/s':>10s}{'steps/s':>9s}{'median':>9s}{'p90':>8s}{'p99':>8s} ms")
    for (count, name), (prompts, times) in busy.items():
        figures = (statistics.median(times), quantile(times, 0.9), quantile(times, 0.99))
        print(
            f"{f'{count} decoding, {name}':40s}{1e3 / statistics.mean(prompts):10.2f}"
            f"{1e3 / statistics.mean(times):9.1f}{figures[0]:9.2f}{figures[1]:8.2f}{figures[2]:8.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["steps", "workers"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.5, help="for both busy, in each round")
    arguments = parser.parse_args()
    if arguments.part in (None, "steps"):
        steps(arguments.rounds)
    if arguments.part in (None, "workers"):
        workers(arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
