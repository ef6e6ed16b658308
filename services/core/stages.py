"""The life of a request, as the gateway sees it: its stages, and which may follow which.

    RECEIVED ── ADMITTED ── ROUTED ── PREFILLING ─┬─ TRANSFERRING ─┬─ DECODING ── FINISHED
                   ^                              └────────────────┴─ (finished at the first token)
                   └── another attempt, from ROUTED, PREFILLING, TRANSFERRING or DECODING

Every stage before the end may also turn into FAILED or CANCELLED. Histograms and timings come from
the transitions that a Timeline records, never from calls scattered over the request path.
"""

from collections.abc import Callable
from enum import StrEnum

from services.core.clock import Clock


class Stage(StrEnum):
    RECEIVED = "received"  # parsing, chat template, tokenising
    ADMITTED = "admitted"  # locating cached prefixes and waiting for a route
    ROUTED = "routed"  # workers chosen, work on its way to them
    PREFILLING = "prefilling"  # until the first token of the attempt
    TRANSFERRING = "transferring"  # the first token is out, the decode worker does not have the KV yet
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDS = frozenset({Stage.FINISHED, Stage.FAILED, Stage.CANCELLED})
_BROKEN_OFF = {Stage.FAILED, Stage.CANCELLED}
_ATTEMPT_OVER = {Stage.ADMITTED, *_BROKEN_OFF}

TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.RECEIVED: frozenset({Stage.ADMITTED, *_BROKEN_OFF}),
    Stage.ADMITTED: frozenset({Stage.ROUTED, *_BROKEN_OFF}),
    Stage.ROUTED: frozenset({Stage.PREFILLING, *_ATTEMPT_OVER}),
    Stage.PREFILLING: frozenset({Stage.TRANSFERRING, Stage.DECODING, Stage.FINISHED, *_ATTEMPT_OVER}),
    Stage.TRANSFERRING: frozenset({Stage.DECODING, Stage.FINISHED, *_ATTEMPT_OVER}),
    Stage.DECODING: frozenset({Stage.FINISHED, *_ATTEMPT_OVER}),
    Stage.FINISHED: frozenset(),
    Stage.FAILED: frozenset(),
    Stage.CANCELLED: frozenset(),
}


class Timeline:
    """The transitions of one request, in seconds of the injected clock.

    `on_leave(stage, seconds)` is called for every visit of a stage when it ends. `started_at` is the
    clock's time when the request came in, if that was earlier than now.
    """

    def __init__(
        self, clock: Clock, on_leave: Callable[[Stage, float], None], started_at: float | None = None
    ) -> None:
        self._clock = clock
        self._on_leave = on_leave
        self._seconds: dict[Stage, float] = {}
        self.started_at = clock.now() if started_at is None else started_at
        self.entered_at = self.started_at
        self.stage = Stage.RECEIVED

    def enter(self, stage: Stage) -> None:
        """Leave the present stage for `stage`; an illegal transition is a programmer's error."""
        assert stage in TRANSITIONS[self.stage], f"illegal transition {self.stage} -> {stage}"
        now = self._clock.now()
        spent = now - self.entered_at
        self._seconds[self.stage] = self._seconds.get(self.stage, 0.0) + spent
        self._on_leave(self.stage, spent)
        self.stage, self.entered_at = stage, now

    def seconds_in(self, stage: Stage) -> float:
        """Time spent in finished visits of `stage`, over all attempts."""
        return self._seconds.get(stage, 0.0)
