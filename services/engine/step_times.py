"""How long this worker's steps take, smoothed: what the scheduler and the router plan with."""

_WEIGHT = 0.2  # of the newest sample: five steps forget most of an outlier
# A process that was stopped for seconds in a step is no slow worker: what is far above all before counts
# as so many times as long. A worker that does get slower is known to be after a few steps all the same.
_OUTLIER = 4.0


class StepTimes:
    """0.0 stands for "not measured yet"."""

    def __init__(self) -> None:
        self.prefill_ms_per_token = 0.0
        self.decode_step_ms = 0.0

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
            self.decode_step_ms = _smooth(self.decode_step_ms, step_ms)
        else:
            prefill_ms = step_ms - (self.decode_step_ms if decode_tokens else 0.0)
            if prefill_ms > 0:
                self.prefill_ms_per_token = _smooth(self.prefill_ms_per_token, prefill_ms / prefill_tokens)


def _smooth(old: float, sample: float) -> float:
    if old == 0.0:
        return sample
    return (1 - _WEIGHT) * old + _WEIGHT * min(sample, _OUTLIER * old)
