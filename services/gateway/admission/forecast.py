"""What to expect of the next requests, from what was seen of the last ones.

Three estimates, each an average that forgets: how long answers are, how fast the queue moves while it is
not empty, and how the first tokens came beside what the router had expected. The last two correct the
router's predictions, so that a cost model that is wrong does not make admission wrong for ever.
"""

ANSWER_TOKENS_ASSUMED = 128.0  # until answers have ended
ANSWERS_REMEMBERED = 50  # about; an older answer counts 1 / e of a new one
BUSY_S_REMEMBERED = 20.0  # seconds in which somebody waited
PRIOR_S = 2.0  # what the router predicts counts as much as so many seconds seen, and is forgotten like them
TOKENS_PER_S_MIN = 1.0  # of a queue that stands still; expected waits must be finite
FIRST_TOKENS_REMEMBERED = 20
# A correction beyond these would come of something else than a wrong cost model, such as a failed worker.
CORRECTION_MIN, CORRECTION_MAX = 0.2, 5.0


class AnswerLengths:
    def __init__(self) -> None:
        self._mean = ANSWER_TOKENS_ASSUMED
        self._seen = 1  # what is assumed counts like one answer

    def note(self, tokens: int, max_tokens: int) -> None:
        """An answer has ended. One that its limit has cut short of what others have says nothing of these."""
        if max_tokens <= tokens < self._mean:
            return
        self._seen = min(self._seen + 1, ANSWERS_REMEMBERED)
        self._mean += (tokens - self._mean) / self._seen

    def expected(self, max_tokens: int) -> int:
        """Of an answer that may have `max_tokens`; at least 1."""
        return max(1, min(max_tokens, round(self._mean)))


class Throughput:
    """Tokens per second that leave the queue while somebody waits in it."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._predicted_s = PRIOR_S  # what is left of the prediction's weight

    def note_wait(self, seconds: float) -> None:
        """For so long somebody waited."""
        kept = max(0.0, 1.0 - seconds / BUSY_S_REMEMBERED)
        self._tokens *= kept
        self._predicted_s *= kept
        self._seconds = self._seconds * kept + seconds

    def note_leave(self, tokens: int) -> None:
        """Somebody's wait is over, or somebody went while others waited."""
        self._tokens += tokens

    def per_second(self, predicted: float) -> float:
        """`predicted` is what the router thinks, before anything was seen."""
        tokens = self._tokens + predicted * self._predicted_s
        return max(tokens / (self._seconds + self._predicted_s), TOKENS_PER_S_MIN)


class Correction:
    """The factor by which first tokens come later than expected."""

    def __init__(self) -> None:
        self._seen_ms = self._expected_ms = 0.0

    def note(self, expected_ms: float, seen_ms: float) -> None:
        kept = 1.0 - 1.0 / FIRST_TOKENS_REMEMBERED
        self._expected_ms = self._expected_ms * kept + expected_ms
        self._seen_ms = self._seen_ms * kept + seen_ms

    @property
    def factor(self) -> float:
        if self._expected_ms <= 0.0:
            return 1.0
        return min(max(self._seen_ms / self._expected_ms, CORRECTION_MIN), CORRECTION_MAX)
