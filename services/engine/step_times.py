"""How long this worker's steps take, smoothed: what the scheduler and the router plan with."""

_WEIGHT = 0.2  # of the newest sample: five steps forget most of an outlier


class StepTimes:
    """0.0 stands for "not measured yet"."""

    def __init__(self) -> None:
        self.prefill_ms_per_token = 0.0
        self.decode_step_ms = 0.0

    def add(self, step_ms: float, prefill_tokens: int, decode_tokens: int) -> None:
        """A step's duration. In a mixed step the prompt tokens get what decoding alone would not take."""
        if prefill_tokens == 0:
            self.decode_step_ms = _smooth(self.decode_step_ms, step_ms)
        else:
            prefill_ms = step_ms - (self.decode_step_ms if decode_tokens else 0.0)
            if prefill_ms > 0:
                self.prefill_ms_per_token = _smooth(self.prefill_ms_per_token, prefill_ms / prefill_tokens)


def _smooth(old: float, sample: float) -> float:
    return sample if old == 0.0 else (1 - _WEIGHT) * old + _WEIGHT * sample
