"""The steps that an engine runs before its worker says that it is ready.

The first steps of a process are several times slower than those that follow: code, memory and threads are
new. Here no request waits for them, and the router has a measured model of the worker from the start. What
they compute goes to blocks that nobody owns yet.
"""

from collections.abc import Sequence

from router.step_model import StepWork, context_of
from services.core.clock import Clock
from services.core.sampling import SamplingParams
from services.engine.runner import ModelRunner, Row, Sample
from services.engine.step_times import StepTimes

_TOKENS = 64  # of a chunk
_CONTEXT = 512  # before one
_SEQUENCES = 8  # of a decode step
_TOKEN = 0  # any


def warm_up(runner: ModelRunner, times: StepTimes, clock: Clock, blocks: int, block_size: int) -> None:
    """Tell `times` how long chunks and decode steps of some sizes take."""
    tokens = min(_TOKENS, blocks * block_size // 2)
    context = min(_CONTEXT, blocks * block_size - tokens)
    table = range(-(-(context + tokens) // block_size))
    small, large, late = (
        _chunk(n, start, table) for n, start in ((tokens // 4, 0), (tokens, 0), (tokens, context))
    )
    one, several = _decoding(1, tokens, table), _decoding(_SEQUENCES, context, table)
    for rows in (small, one):
        runner.run(rows)
    for rows in (small, large, late, one, several):
        started_s = clock.now()
        runner.run(rows)
        times.add((clock.now() - started_s) * 1e3, _work(rows))


def _chunk(tokens: int, start: int, table: Sequence[int]) -> list[Row]:
    return [Row([_TOKEN] * tokens, start, table, ())]


def _decoding(sequences: int, context: int, table: Sequence[int]) -> list[Row]:
    sample = Sample(SamplingParams(max_tokens=1), [_TOKEN], [_TOKEN])
    return [Row([_TOKEN], context, table, (sample,)) for _ in range(sequences)]


def _work(rows: Sequence[Row]) -> StepWork:
    chunks = [row for row in rows if not row.samples]
    decoding = [row for row in rows if row.samples]
    return StepWork(
        tokens=sum(len(row.tokens) for row in chunks),
        token_context=sum(context_of(len(row.tokens), row.start) for row in chunks),
        sequences=len(decoding),
        context=sum(row.start + 1 for row in decoding),
    )
