"""What a chaos run found: numbers for people and for programs, and whether the cluster has passed."""

from collections import Counter
from collections.abc import Sequence

import msgspec

from loadtest.summary import percentile
from tests.chaos.reply import Reply


class Report(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    seed: int
    transports: str  # of KV, that the workers were to use, best first
    over_grpc: dict[str, int]  # how often they told that it is not NIXL, by what they said
    requests: int
    several: int  # completed, with more than one choice
    completed: int
    hung_up: int  # clients that left, as planned
    failed: int
    resumed: int  # completed after a second attempt or more
    attempts_max: int
    different: int  # answers that are not the undisturbed run's
    unseeded_checked: int  # resumed answers to a drawn seed, asked again with it
    usage_mistakes: int
    held: list[str]  # blocks, leases, sequences and requests that were left, in words
    pause_ms_max: float  # between two chunks of one choice of a stream
    pause_at_s: float  # when it began, on the clock of faults.log
    first_token_ms_p50: float
    first_token_ms_p99: float
    faults: dict[str, int]
    retries: dict[str, int]  # by error, as the gateway counts them
    problems: list[str]  # one line for each failed, different or miscounted answer

    @property
    def violations(self) -> list[str]:
        """What must not happen while a worker of each needed kind is well."""
        counts = {
            "failed requests": self.failed,
            "answers that differ from the undisturbed run's": self.different,
            "usage mistakes": self.usage_mistakes,
            "things left over": len(self.held),
        }
        found = [f"{count} {what}" for what, count in counts.items() if count]
        return found if self.completed else [*found, "no answer was completed"]

    def __str__(self) -> str:
        rows = [
            ("seconds, seed", f"{self.seconds:.0f}, {self.seed}"),
            ("transports", self.transports),
            ("requests", f"{self.requests}: {self.completed} completed, {self.hung_up} hung up"),
            ("completed with n > 1", self.several),
            ("failed", self.failed),
            ("resumed", f"{self.resumed}, at most {self.attempts_max} attempts"),
            ("different from undisturbed", self.different),
            ("unseeded, asked again", self.unseeded_checked),
            ("usage mistakes", self.usage_mistakes),
            ("left over", "; ".join(self.held) or "nothing"),
            ("longest pause in a stream", f"{self.pause_ms_max:.0f} ms, from {self.pause_at_s:.2f} s on"),
            (
                "time to first token",
                f"p50 {self.first_token_ms_p50:.0f}, p99 {self.first_token_ms_p99:.0f} ms",
            ),
            *(("instead of NIXL", f"{count} x {said}") for said, count in sorted(self.over_grpc.items())),
            *((f"fault: {name}", count) for name, count in sorted(self.faults.items())),
            *((f"retry: {name}", count) for name, count in sorted(self.retries.items())),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}}  {value}" for name, value in rows]
        return "\n".join([*lines, *self.problems, *(f"VIOLATION: {text}" for text in self.violations)])


class Findings:
    """Collected while a run goes on and afterwards, until the report is made."""

    def __init__(self, seconds: float, seed: int, transports: str) -> None:
        self._seconds, self._seed, self._transports = seconds, seed, transports
        self.replies: list[Reply] = []
        self.different: list[str] = []
        self.unseeded_checked = 0
        self.held: list[str] = []
        self.started_s = 0.0
        self.faults: Counter[str] = Counter()
        self.retries: dict[str, int] = {}
        self.over_grpc: dict[str, int] = {}

    def report(self) -> Report:
        ends = Counter(reply.end for reply in self.replies)
        mistakes = [_line(r, r.usage_mistake) for r in self.replies if r.usage_mistake]
        failures = [_line(r, r.problem) for r in self.replies if r.end == "failed"]
        pause_s, pause_at_s = max((r.longest_pause for r in self.replies), default=(0.0, self.started_s))
        first_s = sorted(r.first_token_s for r in self.replies if r.first_token_s is not None)
        return Report(
            seconds=self._seconds,
            seed=self._seed,
            transports=self._transports,
            over_grpc=self.over_grpc,
            requests=len(self.replies),
            completed=ends["completed"],
            hung_up=ends["hung_up"],
            failed=ends["failed"],
            several=sum(r.end == "completed" and r.ask.choices > 1 for r in self.replies),
            resumed=sum(r.end == "completed" and r.resumed for r in self.replies),
            attempts_max=max((r.timings.get("attempts", 1) for r in self.replies), default=0),
            different=len(self.different),
            unseeded_checked=self.unseeded_checked,
            usage_mistakes=len(mistakes),
            held=self.held,
            pause_ms_max=pause_s * 1e3,
            pause_at_s=pause_at_s - self.started_s,
            first_token_ms_p50=_percentile_ms(first_s, 50),
            first_token_ms_p99=_percentile_ms(first_s, 99),
            faults=dict(self.faults),
            retries=self.retries,
            problems=[*failures, *self.different, *mistakes],
        )


def _line(reply: Reply, what: str) -> str:
    return f"request {reply.ask.number} ({reply.ask.kind}), {reply.tokens} tokens: {what}"


def _percentile_ms(ordered_s: Sequence[float], percent: float) -> float:
    return percentile(ordered_s, percent) * 1e3 if ordered_s else 0.0
