"""How long this worker's steps take, smoothed: what the scheduler and the router plan with.

Each measure is the moving average of the median of the last three samples: one step in which the process
was stopped for seconds makes no slow worker, while one that did get slower is known after a few steps.
"""

from collections import deque
from statistics import median_low

_WEIGHT = 0.2  # of the newest median: five steps forget most of what was before


class _Measure:
    """0.0 stands for "not measured yet"."""

    def __init__(self) -> None:
        self.value = 0.0
        self._latest: deque[float] = deque(maxlen=3)

    def add(self, sample: float) -> None:
        self._latest.append(sample)
        typical = median_low(self._latest)  # of two, which tell nothing yet, the lesser
        self.value = (1 - _WEIGHT) * self.value + _WEIGHT * typical if self.value else typical


class StepTimes:
    def __init__(self) -> None:
        self._prefill_token = _Measure()
        self._decode_step = _Measure()

    @property
    def prefill_ms_per_token(self) -> float:
        """0.0 before the first prompt."""
        return self._prefill_token.value

    @property
    def decode_step_ms(self) -> float:
        """0.0 before the first step that only decoded."""
        return self._decode_step.value

    def expected_ms(self, prefill_tokens: int, decode_tokens: int) -> float | None:
        """How long a step with so many tokens will take. None: nothing like it was measured yet."""
        unmeasured = (prefill_tokens and not self.prefill_ms_per_token) or (
            decode_tokens and not self.decode_step_ms
        )
        if unmeasured:
            return None
        decode_ms = self.decode_step_ms if decode_tokens else 0.0
        return decode_ms + prefill_tokens * self.prefill_ms_per_token

    def add(self, step_ms: float, prefill_tokens: int, decode_tokens: int) -> None:
        """A step's duration. In a mixed step the prompt tokens get what decoding alone would not take."""
        if prefill_tokens == 0:
            self._decode_step.add(step_ms)
        else:
            prefill_ms = step_ms - (self.decode_step_ms if decode_tokens else 0.0)
            if prefill_ms > 0:
                self._prefill_token.add(prefill_ms / prefill_tokens)
