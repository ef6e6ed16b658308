"""How long this worker's steps take: the step model fitted online, what scheduler and router plan with.

Samples are kept, the newest 64 steps that computed prompt tokens and the newest 64 that only decoded, so
that hours of one kind do not make the other forgotten; adding one is a line in a table. From time to
time a fit goes over both tables: weighted least squares of the *relative* error, none of the
coefficients negative. A sample's weight halves with each 20 newer ones of its kind, so a machine that
becomes slower is known after some tens of steps, and it falls with the square of its residual (Cauchy's
weights, by iteratively reweighted least squares), so one step in which the process was stopped makes no
slow worker.

Where the samples do not tell (a worker that has only seen one batch size cannot know which part of a
step grows with the batch), a small ridge decides: towards the previous fit, so what was learned once
stays; at first towards equal shares of all that may have taken the time.
"""

import numpy as np
import numpy.typing as npt

from router.step_model import StepModel, StepWork

Array = npt.NDArray[np.float64]

_SAMPLES = 64  # of each kind
_HALF_LIFE = 20  # in samples of its kind
_FIT_EVERY = 16  # samples; a fit takes about 0.2 ms, a step at least some
_REWEIGHTINGS = 3
_TYPICAL_RESIDUAL = 1.0  # half the weight for a step that took twice as long as expected
_RIDGE = 0.01  # as a share of what the samples say of the same coefficient
_LEAST = 1e-6  # ms: a coefficient of a kind that was measured; zero would say that it was not


class StepTimes:
    def __init__(self) -> None:
        self._prefilling, self._decoding = _Samples(), _Samples()
        self._decoded = False  # in a step of either kind
        self._unfitted = 0  # samples since the last fit
        self._coefficients = np.zeros(5)

    def add(self, step_ms: float, work: StepWork) -> None:
        """A step's duration."""
        samples = self._prefilling if work.tokens else self._decoding
        samples.add(step_ms, work)
        self._decoded = self._decoded or work.sequences > 0
        self._unfitted += 1

    @property
    def model(self) -> StepModel | None:
        """None before the first step."""
        count = self._prefilling.count + self._decoding.count
        if count == 0:
            return None
        if self._unfitted >= min(_FIT_EVERY, 1 + count // 4):
            self._fit()
        step, token, token_context, sequence, context = map(float, self._coefficients)
        return StepModel(
            step=step,
            token=max(token, _LEAST) if self._prefilling.count else 0.0,
            token_context=token_context,
            sequence=max(sequence, _LEAST) if self._decoded else 0.0,
            context=context,
        )

    def expected_ms(self, work: StepWork) -> float | None:
        """How long a step will take. None: nothing like it was measured yet."""
        if (work.tokens and not self._prefilling.count) or (work.sequences and not self._decoded):
            return None
        model = self.model
        return model.step_ms(work) if model else None

    def _fit(self) -> None:
        kinds = (self._prefilling, self._decoding)
        rows = np.concatenate([kind.rows[: kind.count] for kind in kinds])
        freshness = np.concatenate([kind.freshness() for kind in kinds])
        self._coefficients = fitted(rows[:, :5], rows[:, 5], freshness, self._coefficients)
        self._unfitted = 0


class _Samples:
    """The newest steps of one kind: a ring of rows (1, T, X, S, C, milliseconds)."""

    def __init__(self) -> None:
        self.rows = np.zeros((_SAMPLES, 6))
        self.count = 0
        self._next = 0

    def add(self, step_ms: float, work: StepWork) -> None:
        self.rows[self._next] = (
            1.0,
            work.tokens,
            work.token_context,
            work.sequences,
            work.context,
            max(step_ms, _LEAST),
        )
        self._next = (self._next + 1) % _SAMPLES
        self.count = min(self.count + 1, _SAMPLES)

    def freshness(self) -> Array:
        """The weight of each row by its age: 1 for the newest."""
        ages = (self._next - 1 - np.arange(self.count)) % _SAMPLES
        return np.asarray(0.5 ** (ages / _HALF_LIFE))


def fitted(work: Array, ms: Array, freshness: Array, previous: Array) -> Array:
    """The coefficients (5,) of `work` (n, 5) that explain `ms` (n,) best; `previous` (5,) breaks ties.

    The first turn weighs by the measured times, which trusts fast steps most: nothing makes a step
    faster than it is. The next ones weigh by the expected times, which has no bias.
    """
    rows = np.column_stack([work, ms])
    products = rows[:, :, None] * rows[:, None, :]  # of each row with itself: their sum is what a fit needs
    coefficients = _ridge(freshness / ms**2, products, previous)
    for _ in range(_REWEIGHTINGS):
        expected = np.maximum(work @ coefficients, ms / 10)
        residuals = (ms - expected) / expected
        weights = freshness / expected**2 / (1 + (residuals / _TYPICAL_RESIDUAL) ** 2)
        coefficients = _ridge(weights, products, previous)
    return coefficients


def _ridge(weights: Array, products: Array, previous: Array) -> Array:
    """Least squares with a ridge, in units in which every column of the data has length 1."""
    sums: Array = np.tensordot(weights, products, 1)
    normal, target = sums[:5, :5], sums[:5, 5]
    lengths = np.sqrt(normal.diagonal())
    seen = np.flatnonzero(lengths)
    scale = lengths[seen]
    normal = normal[np.ix_(seen, seen)] / np.outer(scale, scale) + _RIDGE * np.eye(len(seen))
    target = target[seen] / scale + _RIDGE * scale * previous[seen]
    coefficients = previous.copy()
    coefficients[seen] = _nonnegative(normal, target) / scale
    return coefficients


def _nonnegative(normal: Array, target: Array) -> Array:
    """min x'Ax/2 - b'x over x >= 0, for positive definite A (Lawson and Hanson's active set method)."""
    unbounded: Array = np.asarray(np.linalg.solve(normal, target), dtype=np.float64)
    if (unbounded >= 0).all():
        return unbounded
    solution = np.zeros_like(target)
    free = np.zeros(len(target), dtype=bool)
    for _ in range(3 * len(target)):  # it ends far earlier; rounding must not make it endless
        gradient = np.where(free, 0.0, target - normal @ solution)
        if gradient.max() <= 1e-9 * np.abs(target).max():
            break
        free[gradient.argmax()] = True
        solution = _descended(normal, target, solution, free)
    return solution


def _descended(normal: Array, target: Array, solution: Array, free: npt.NDArray[np.bool_]) -> Array:
    """The least over the free coordinates; those that become zero on the way are bound: no longer free."""
    while free.any():
        best = np.zeros_like(solution)
        best[free] = np.linalg.solve(normal[np.ix_(free, free)], target[free])
        negative = best < 0
        if not negative.any():
            return best
        shares = solution[negative] / (solution[negative] - best[negative])
        solution = np.maximum(solution + shares.min() * (best - solution), 0.0)
        solution[np.flatnonzero(negative)[shares.argmin()]] = 0.0
        free &= solution > 0
    return np.zeros_like(solution)
