"""From exchanges to a repetition's figures, and from repetitions to medians. Times are milliseconds."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, median

import msgspec

from loadtest.summary import percentile
from tests.bench.cpu.client import Exchange, Taken


class Figures(msgspec.Struct, frozen=True):
    """`None`: not to be seen (an offline contestant has no first token; nothing was answered)."""

    tokens_per_s: float  # of whole answers, over all clients
    ttft_ms: float | None = None  # to the first token, mean over requests
    tpot_ms: float | None = None  # for each further token, mean over requests
    itl_p99_ms: float | None = None  # between two arrivals of an answer
    itl_max_ms: float | None = None
    tokens_per_event: float | None = None  # above 1 the server sent several at once
    requests: int = 0
    failed: int = 0
    problems: dict[str, int] = {}  # why, and how many
    memory_mib: float | None = None  # proportional, of all processes

    @classmethod
    def of(cls, taken: Taken, memory_mib: float | None = None) -> "Figures":
        answered = [exchange for exchange in taken.exchanges if not exchange.problem]
        gaps = sorted(gap for exchange in answered for gap in gaps_ms(exchange))
        tokens = sum(exchange.tokens for exchange in answered)
        return cls(
            tokens_per_s=tokens / taken.seconds,
            ttft_ms=_mean([ttft_ms(exchange) for exchange in answered]),
            tpot_ms=_mean([tpot_ms(exchange) for exchange in answered if exchange.tokens > 1]),
            itl_p99_ms=percentile(gaps, 99) if gaps else None,
            itl_max_ms=gaps[-1] if gaps else None,
            tokens_per_event=tokens / sum(len(e.arrivals) for e in answered) if answered else None,
            requests=len(taken.exchanges),
            failed=len(taken.exchanges) - len(answered),
            problems=dict(Counter(exchange.problem for exchange in taken.exchanges if exchange.problem)),
            memory_mib=memory_mib,
        )


def ttft_ms(exchange: Exchange) -> float:
    return 1e3 * (exchange.arrivals[0] - exchange.sent_at)


def tpot_ms(exchange: Exchange) -> float:
    return 1e3 * (exchange.arrivals[-1] - exchange.arrivals[0]) / (exchange.tokens - 1)


def gaps_ms(exchange: Exchange) -> list[float]:
    return [1e3 * (later - earlier) for earlier, later in itertools.pairwise(exchange.arrivals)]


def medians(repetitions: Sequence[Figures]) -> Figures:
    """Each figure's median over repetitions; requests and failures are summed, memory is the most."""
    problems: Counter[str] = Counter()
    for figures in repetitions:
        problems.update(figures.problems)
    return Figures(
        tokens_per_s=median(figures.tokens_per_s for figures in repetitions),
        ttft_ms=_over(median, [figures.ttft_ms for figures in repetitions]),
        tpot_ms=_over(median, [figures.tpot_ms for figures in repetitions]),
        itl_p99_ms=_over(median, [figures.itl_p99_ms for figures in repetitions]),
        itl_max_ms=_over(median, [figures.itl_max_ms for figures in repetitions]),
        tokens_per_event=_over(median, [figures.tokens_per_event for figures in repetitions]),
        requests=sum(figures.requests for figures in repetitions),
        failed=sum(figures.failed for figures in repetitions),
        problems=dict(problems),
        memory_mib=_over(max, [figures.memory_mib for figures in repetitions]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _over(function: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return function(known) if known else None
