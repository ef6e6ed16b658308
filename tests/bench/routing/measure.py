"""Measures step_times.json: steps of the default model, and KV on its way between two workers.

    python -m tests.bench.routing.measure [--out FILE] [--rounds N]          (about three minutes)

Steps run in this process, through the production TorchRunner with one thread. A point is the median of
the faster half of its rounds: what else the machine did meanwhile is left out, since the benchmark adds
noise of its own. Transfers are fetches of cached prefixes in a real cluster (tests.bench.prefix_fetch).
"""

import argparse
import asyncio
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from services.core.sampling import SamplingParams
from services.engine.device.torch_runner import TorchRunner
from services.engine.runner import Row, Sample
from services.model.files import ModelFiles, open_model
from services.model.pull import ensure_default_model
from tests.bench import prefix_fetch
from tests.bench.routing.step_table import MEASURED, Grid, StepTable
from tests.support.cluster import ClusterSpec, RunningCluster
from tests.support.prompts import build_prompts

BLOCK_SIZE = 32
CHUNKS = (1, 8, 16, 32, 64, 128)
STARTS = (0, 256, 1024, 2048, 4096, 8064)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 256, 1024, 2048, 4096)
MIXED = ((16, 256, 4, 256), (64, 256, 4, 256), (64, 1024, 8, 256), (32, 256, 16, 512))
# The decoding sequences of a step hold at most this much KV, 3 GB; points beyond continue the line.
KV_TOKENS_MAX = 65_536
BRIEF_S = 1.0  # a point is measured no longer than this, if it has MIN_ROUNDS
MIN_ROUNDS = 2


class Steps:
    """Steps of the real model."""

    def __init__(self, files: ModelFiles, rounds: int) -> None:
        geometry = files.config.pool_geometry(KV_TOKENS_MAX // BLOCK_SIZE, BLOCK_SIZE, "float32")
        self._runner = TorchRunner(files, geometry, None, threads=1)
        self._rounds = rounds

    def prefill(self) -> Grid:
        ms = [[self._ms([self._row(chunk, start)]) for start in STARTS] for chunk in CHUNKS]
        return Grid(list(CHUNKS), list(STARTS), ms)

    def decode(self) -> Grid:
        ms = [self._decode_line(sequences) for sequences in SEQUENCES]
        return Grid(list(SEQUENCES), list(CONTEXTS), ms)

    def mixed_saving_ms(self) -> float:
        savings = []
        for chunk, start, sequences, context in MIXED:
            prefill, decode = [self._row(chunk, start)], self._decoding(sequences, context)
            savings.append(self._ms(prefill) + self._ms(decode) - self._ms(prefill + decode))
        return max(0.0, median(savings))

    def _decode_line(self, sequences: int) -> list[float]:
        fitting = [context for context in CONTEXTS if sequences * context <= KV_TOKENS_MAX]
        ms = [self._ms(self._decoding(sequences, context)) for context in fitting]
        for context in CONTEXTS[len(fitting) :]:
            slope = (ms[len(fitting) - 1] - ms[len(fitting) - 2]) / (fitting[-1] - fitting[-2])
            ms.append(ms[len(fitting) - 1] + slope * (context - fitting[-1]))
        return [round(one, 3) for one in ms]

    def _decoding(self, sequences: int, context: int) -> list[Row]:
        blocks = context // BLOCK_SIZE
        return [self._row(1, context - 1, place * blocks, [1]) for place in range(sequences)]

    def _row(self, tokens: int, start: int, first_block: int = 0, output_ids: Sequence[int] = ()) -> Row:
        blocks = -(-(start + tokens) // BLOCK_SIZE)
        sample = Sample(SamplingParams(max_tokens=1000, temperature=0.0), [1], output_ids)
        return Row([5] * tokens, start, range(first_block, first_block + blocks), [sample])

    def _ms(self, rows: Sequence[Row]) -> float:
        return round(_milliseconds(lambda: self._runner.run(rows), self._rounds), 3)


def _milliseconds(step: Callable[[], object], rounds: int) -> float:
    step()
    times: list[float] = []
    while len(times) < rounds and (len(times) < MIN_ROUNDS or sum(times) < BRIEF_S):
        started_s = time.perf_counter()
        step()
        times.append(time.perf_counter() - started_s)
    faster = sorted(times)[: (len(times) + 1) // 2]
    return 1e3 * median(faster)


def measure_transfer(model: Path, rounds: int) -> tuple[float, float]:
    """Milliseconds of a fetch: fixed, and for each token."""
    longest = max(build_prompts(open_model(model).tokenizer()), key=len)
    with tempfile.TemporaryDirectory() as folder:
        spec = ClusterSpec(prefill=2, decode=1, split="always", blocks=(2 * rounds + 4) * 80)
        cluster = RunningCluster(spec, model, Path(folder) / "home")
        try:
            fetches_ms = asyncio.run(_fetches_ms(cluster, longest, rounds))
        finally:
            cluster.stop()
    slope, intercept = np.polyfit(prefix_fetch.LENGTHS, fetches_ms, 1)
    return round(max(0.0, float(intercept)), 2), round(max(0.0, float(slope)), 4)


async def _fetches_ms(cluster: RunningCluster, prompt: list[int], rounds: int) -> list[float]:
    warm, cold = [report for report in await cluster.reports() if report.role == "prefill"]
    client = prefix_fetch.GrpcWorkerClient()
    bench = prefix_fetch.Bench(client, warm, cold)
    times = []
    for length in (prefix_fetch.LENGTHS[0], *prefix_fetch.LENGTHS):  # the first steps of a process are slower
        measured = await bench.measure(prompt[: length + prefix_fetch.TAIL], rounds)
        times.append(median(measured.fetch))
    await client.close()
    return times[1:]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.routing.measure", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=MEASURED, metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of each point (default: 9)")
    given = parser.parse_args()
    model = ensure_default_model()
    files = open_model(model)
    steps = Steps(files, given.rounds)
    print("prefill steps", flush=True)
    prefill = steps.prefill()
    print("decode steps", flush=True)
    decode = steps.decode()
    saving_ms = steps.mixed_saving_ms()
    print("transfers", flush=True)
    transfer_ms, transfer_ms_per_token = measure_transfer(model, rounds=5)
    table = StepTable(
        machine=machine(),
        model=files.name,
        threads=1,
        prefill=prefill,
        decode=decode,
        mixed_saving_ms=saving_ms,
        transfer_ms=transfer_ms,
        transfer_ms_per_token=transfer_ms_per_token,
    )
    given.out.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
