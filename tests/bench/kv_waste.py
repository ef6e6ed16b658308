"""How much of the allocated KV memory holds no token, under continuous batching of a real trace.

    python -m tests.bench.kv_waste [--lengths FILE] [--requests N|all] [--sequences N]

The lengths of real conversations (ShareGPT) are replayed through the production engine, scheduler
and block pool; only the model is replaced, by one that takes modelled time and answers a constant.
After every step each sequence's allocated slots are compared with the tokens that it has computed:

    empty(t) = (allocated - computed) / allocated        printed: its average over time

A token that was sampled and is computed in the next step counts as empty. No prompt shares a prefix
with another, so nothing is counted twice. The published figure for vLLM is below 4 % (Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023, figure 2).
"""

import argparse
import csv
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.core.block_hash import Compatibility
from services.core.clock import ManualClock
from services.core.sampling import SamplingParams
from services.engine.engine import Engine
from services.engine.messages import Limits, Submit
from services.engine.runner import Outcome, Row
from services.worker.config import WorkerConfig

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = ROOT.parent / "shared" / "data" / "sharegpt_lengths.csv"
TOKENS_MAX = 2048  # prompt and answer of one request, below
POOL_TOKENS = 4096 * 16
BLOCK_SIZES = (8, 16, 32)
CONSTANT_TOKEN = 7
WAITING = 8  # requests that wait for admission, so that a free place is taken at once


@dataclass(frozen=True, slots=True)
class Request:
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class StepModel:
    """How long a step takes. It decides how long a prompt waits for its chunks.

    The defaults are those of the default model on one CPU core.
    """

    decode_ms: float = 20.0  # of any step
    prefill_ms_per_token: float = 2.0  # beside it


class ModelledRunner:
    """Answers a constant and lets modelled time pass."""

    def __init__(self, clock: ManualClock, model: StepModel) -> None:
        self._clock, self._model = clock, model

    def prepare(self, params: SamplingParams) -> bool:
        return True

    def run(self, rows: Sequence[Row]) -> list[Outcome]:
        prefill_tokens = sum(len(row.tokens) for row in rows if not _decodes(row))
        step_ms = self._model.decode_ms + self._model.prefill_ms_per_token * prefill_tokens
        self._clock.advance(step_ms / 1e3)
        return [Outcome([CONSTANT_TOKEN] * len(row.samples), [None] * len(row.samples)) for row in rows]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        pass


def _decodes(row: Row) -> bool:
    return bool(row.samples) and bool(row.samples[0].output_ids)


@dataclass(slots=True)
class Waste:
    """Integrals over time, in seconds times the share (or number) that the name says."""

    seconds: float = 0.0
    empty: float = 0.0
    sequences: float = 0.0
    preemptions: int = 0

    def add(self, engine: Engine, seconds: float) -> None:
        admitted = engine._scheduler.admitted  # block tables are nobody's business in production
        allocated = sum(len(sequence.blocks) for sequence in admitted) * engine._pool.block_size
        computed = sum(sequence.computed for sequence in admitted)
        if allocated:
            self.seconds += seconds
            self.empty += (allocated - computed) / allocated * seconds
            self.sequences += len(admitted) * seconds


def replay(requests: Sequence[Request], block_size: int, sequences_max: int, model: StepModel) -> Waste:
    """Run all requests, up to `sequences_max` at a time; whenever one ends the next is admitted."""
    clock, waste = ManualClock(), Waste()
    engine = _engine(clock, ModelledRunner(clock, model), block_size, sequences_max)
    pending = deque(_submissions(requests))
    open_requests = 0
    while pending or open_requests:
        while pending and open_requests < sequences_max + WAITING:
            engine.handle(pending.popleft())
            open_requests += 1
        started_s = clock.now()
        engine.step()
        waste.add(engine, clock.now() - started_s)
        report = engine.take_report()
        open_requests -= sum(token.finish is not None for token in report.tokens)
        waste.preemptions = report.gauges.preemptions
    engine.check_integrity()
    return waste


def read_lengths(path: Path) -> list[Request]:
    """All conversations whose prompt and answer together have 2 to TOKENS_MAX - 1 tokens."""
    try:
        with path.open(newline="") as file:
            rows = [
                Request(int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(
            f"cannot read request lengths from {path}: {error}\n"
            "--lengths takes a CSV file with the columns ContextTokens and GeneratedTokens"
        ) from error
    return [
        r
        for r in rows
        if r.prompt_tokens > 0 and r.answer_tokens > 0 and r.prompt_tokens + r.answer_tokens < TOKENS_MAX
    ]


def _engine(clock: ManualClock, runner: ModelledRunner, block_size: int, sequences_max: int) -> Engine:
    defaults = WorkerConfig()
    limits = Limits(
        sequences_max=sequences_max,
        waiting_max=sequences_max + WAITING,
        chunk_tokens_max=defaults.chunk_tokens_max,
        step_ms_target=defaults.step_ms_target,
    )
    compatibility = Compatibility(model="lengths", revision="", block_size=block_size, layout="none")
    return Engine(runner, compatibility, POOL_TOKENS // block_size, limits, clock)


def _submissions(requests: Sequence[Request]) -> Iterator[Submit]:
    rng = random.Random(0)
    for number, request in enumerate(requests):
        prompt_ids = [rng.randrange(1 << 30) for _ in range(request.prompt_tokens)]
        sampling = SamplingParams(max_tokens=request.answer_tokens, temperature=0.0)
        yield Submit(str(number), "local", prompt_ids, [], sampling)


def _line(block_size: int, waste: Waste, seconds: float) -> str:
    return (
        f"{block_size:10d} {100 * waste.empty / waste.seconds:7.2f} %"
        f" {waste.sequences / waste.seconds:10.1f} {waste.preemptions:11d} {seconds:8.0f} s"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.kv_waste", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="CSV file (default: %(default)s)")
    parser.add_argument("--requests", default="2000", metavar="N", help="how many, or `all` (default: 2000)")
    parser.add_argument("--sequences", type=int, default=64, metavar="N", help="at a time (default: 64)")
    times = StepModel()
    parser.add_argument("--decode-ms", type=float, default=times.decode_ms, metavar="MS", help="of a step")
    parser.add_argument(
        "--prefill-ms", type=float, default=times.prefill_ms_per_token, metavar="MS", help="of a prompt token"
    )
    given = parser.parse_args()
    if given.requests != "all" and not given.requests.isdecimal():
        parser.error("--requests takes a number or `all`")
    return given


def main() -> None:
    given = parse_arguments()
    model = StepModel(given.decode_ms, given.prefill_ms)
    requests = read_lengths(given.lengths)
    if given.requests != "all":
        requests = random.Random(1).sample(requests, min(int(given.requests), len(requests)))
    mean = sum(r.prompt_tokens + r.answer_tokens for r in requests) / len(requests)
    print(f"{len(requests)} requests of {mean:.0f} tokens on average, a pool of {POOL_TOKENS} tokens")
    print("block size   empty    sequences preemptions     took")
    for block_size in BLOCK_SIZES:
        started_s = time.perf_counter()
        waste = replay(requests, block_size, given.sequences, model)
        print(_line(block_size, waste, time.perf_counter() - started_s), flush=True)


if __name__ == "__main__":
    main()
