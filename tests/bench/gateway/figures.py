"""From what sources and clients noted to what the gateway added. Times are milliseconds."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from loadtest.summary import percentile
from tests.bench.gateway.load import Call, Served, Window
from tests.bench.gateway.stand import Taken


@dataclass(frozen=True, slots=True)
class Added:
    """Milliseconds that somebody waited for the gateway, sorted."""

    ms: Sequence[float]

    def __str__(self) -> str:
        if not self.ms:
            return f"{'-':>8}{'-':>8}"
        return f"{percentile(self.ms, 50):8.2f}{percentile(self.ms, 99):8.2f}"


@dataclass(frozen=True, slots=True)
class Figures:
    taken: Taken
    requests: int  # ended in the window
    tokens: int  # that came in it
    first: Added  # to the time to the first token
    token: Added  # to each other token
    tokens_per_event: float

    @classmethod
    def of(cls, taken: Taken) -> "Figures":
        window, calls = taken.window, taken.clients.calls
        known = [(call, taken.served.get(call.request_id)) for call in calls]
        events = sum(call.events for call in calls)
        return cls(
            taken,
            requests=sum(call.ended_at is not None and window.covers(call.ended_at) for call in calls),
            tokens=sum(tokens_within(call, window) for call in calls),
            first=Added(sorted(ms for call, at in known if at for ms in first_added(call, at, window))),
            token=Added(sorted(ms for call, at in known if at for ms in tokens_added(call, at, window))),
            tokens_per_event=sum(call.tokens[-1] for call in calls if call.tokens) / max(events, 1),
        )

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.taken.window.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.taken.window.seconds

    @property
    def cpu_share(self) -> float:
        return self.taken.gateway_cpu_s / self.taken.window.seconds

    @property
    def us_per_token(self) -> float:
        return self.taken.gateway_cpu_s * 1e6 / max(self.tokens, 1)

    @property
    def ms_per_request(self) -> float:
        return self.taken.gateway_cpu_s * 1e3 / max(self.requests, 1)

    @property
    def problems(self) -> Counter[str]:
        return Counter(call.problem for call in self.taken.clients.calls if call.problem)


def tokens_within(call: Call, window: Window) -> int:
    """How many of its tokens came in the window."""
    counts = [0, *call.tokens]
    begin, end = bisect_right(call.seen_at, window.measured_from), bisect_right(call.seen_at, window.ends_at)
    return counts[end] - counts[begin]


def first_added(call: Call, served: Served, window: Window) -> Iterator[float]:
    """To the first token of a request that was sent in the window, if it came in it: what the client waited
    longer than the prefill worker took."""
    if call.seen_at and served.replied_at and window.covers(call.sent_at) and window.covers(call.seen_at[0]):
        yield 1e3 * (call.seen_at[0] - call.sent_at - (served.replied_at - served.run_at))


def tokens_added(call: Call, served: Served, window: Window) -> Iterator[float]:
    """To each further token that came in the window: from the decode worker's step to the client."""
    for number, emitted_at in enumerate(served.emitted_at, 2):
        event = bisect_right(call.tokens, number - 1)
        if event < len(call.tokens) and window.covers(call.seen_at[event]):
            yield 1e3 * (call.seen_at[event] - emitted_at)


PART_NAMES = ("parse, template, tokenise", "locate, admit, route", "HTTP in, gRPC out", "gRPC in, HTTP out")


def parts(call: Call, served: Served) -> tuple[float, ...]:
    """Where the first token's added time went; the sum is that of `first_added`.

    The gateway's own timings tell about the middle; what is before and after them until the prefill worker
    has the request cannot be told apart from outside.
    """
    assert call.timings is not None
    tokenize, route = (float(call.timings[name] or 0.0) for name in ("tokenize", "route"))
    before = 1e3 * (served.run_at - call.sent_at)
    return tokenize, route, before - tokenize - route, 1e3 * (call.seen_at[0] - served.replied_at)


def mean_parts(taken: Taken) -> tuple[float, ...] | None:
    """The means over all requests of the window that told their timings."""
    found = [
        parts(call, served)
        for call in taken.clients.calls
        if call.timings is not None
        and (served := taken.served.get(call.request_id)) is not None
        and [*first_added(call, served, taken.window)]
    ]
    return tuple(map(fmean, zip(*found, strict=True))) if found else None
