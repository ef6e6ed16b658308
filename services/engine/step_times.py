"""How long this worker's steps take: the step model fitted online, what scheduler and router plan with.

Samples are kept by the size of their step, the newest 16 of each power of two of prompt tokens and, for steps
that only decode, of sequences: hours of full chunks, or of one batch size, do not make the others forgotten,
and where all sizes are remembered a step's fixed time can be told from its tokens'. Adding a sample is a line
in a table. From time to time a fit goes over the tables: weighted least squares of the *relative* error, none
of the coefficients negative. A sample's weight halves with each 8 newer ones of its size, so a machine that
becomes slower is known after some tens of steps, and with 512 newer ones of any size. It falls with the
square of its residual (Cauchy's weights, by iteratively reweighted least squares), so one step in which the
process was stopped makes no slow worker.

Where the samples do not tell (a worker that has only ever seen one batch size cannot know which part of a
step grows with the batch), a small ridge decides: towards the previous fit, so what was learned once
stays; at first towards equal shares of all that may have taken the time.
"""

import numpy as np
import numpy.typing as npt

from router.step_model import StepModel, StepWork

Array = npt.NDArray[np.float64]

_SAMPLES = 16  # of each size
_HALF_LIFE = 8  # in samples of its size
_HALF_LIFE_ALL = 512  # in samples of all sizes
_FIT_EVERY = 16  # samples; a fit takes about 0.3 ms, a step at least some
_REWEIGHTINGS = 3
_TYPICAL_RESIDUAL = 1.0  # half the weight for a step that took twice as long as expected
_RIDGE = 0.01  # as a share of what the samples say of the same coefficient
_LEAST = 1e-6  # ms: a coefficient of a kind that was measured; zero would say that it was not


class StepTimes:
    def __init__(self) -> None:
        self._sizes: dict[int, _Samples] = {}
        self._count = 0
        self._prefilled = self._decoded = False  # in any step
        self._fit_at = 1  # when so many samples are here
        self._coefficients = np.zeros(5)

    def add(self, step_ms: float, work: StepWork) -> None:
        """A step's duration."""
        size = work.tokens.bit_length() or -work.sequences.bit_length()
        samples = self._sizes.setdefault(size, _Samples())
        samples.add(step_ms, work, self._count)
        self._prefilled = self._prefilled or work.tokens > 0
        self._decoded = self._decoded or work.sequences > 0
        self._count += 1

    @property
    def model(self) -> StepModel | None:
        """None before the first step."""
        if self._count == 0:
            return None
        if self._count >= self._fit_at:
            self._fit()
            self._fit_at = self._count + min(_FIT_EVERY, 1 + self._count // 4)
        step, token, token_context, sequence, context = map(float, self._coefficients)
        return StepModel(
            step=step,
            token=max(token, _LEAST) if self._prefilled else 0.0,
            token_context=token_context,
            sequence=max(sequence, _LEAST) if self._decoded else 0.0,
            context=context,
        )

    def expected_ms(self, work: StepWork) -> float | None:
        """How long a step will take. None: nothing like it was measured yet."""
        if (work.tokens and not self._prefilled) or (work.sequences and not self._decoded):
            return None
        model = self.model
        return model.step_ms(work) if model else None

    def _fit(self) -> None:
        rows = np.concatenate([samples.rows[: samples.count] for samples in self._sizes.values()])
        freshness = np.concatenate([samples.freshness(self._count) for samples in self._sizes.values()])
        self._coefficients = fitted(rows[:, :5], rows[:, 5], freshness, self._coefficients)


class _Samples:
    """The newest steps of one size: a ring of rows (1, T, X, S, C, milliseconds, number)."""

    def __init__(self) -> None:
        self.rows = np.zeros((_SAMPLES, 7))
        self.count = 0
        self._next = 0

    def add(self, step_ms: float, work: StepWork, number: int) -> None:
        self.rows[self._next] = (
            1.0,
            work.tokens,
            work.token_context,
            work.sequences,
            work.context,
            max(step_ms, _LEAST),
            number,
        )
        self._next = (self._next + 1) % _SAMPLES
        self.count = min(self.count + 1, _SAMPLES)

    def freshness(self, now: int) -> Array:
        """The weight of each row by its age: 1 for the newest of all."""
        ages = (self._next - 1 - np.arange(self.count)) % _SAMPLES
        ages_all = now - self.rows[: self.count, 6]
        return np.asarray(0.5 ** (ages / _HALF_LIFE + ages_all / _HALF_LIFE_ALL))


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
