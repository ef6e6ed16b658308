"""What a worker cannot have meant is told apart from what it can."""

import math
from array import array

import pytest

from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import SamplingParams
from services.gateway.workers.nonsense import nonsense
from services.gateway.workers.worker_client import DecodeEvent, OutputToken, PrefillResult, Sequence, Started

SEQUENCE = Sequence(
    request_id="r",
    attempt=0,
    prompt_ids=[1, 2, 3, 4],
    output_ids=[9],
    sampling=SamplingParams(max_tokens=5, prompt_logprobs=1),
    choices=(0, 2),
)
NAN = math.nan


def scored(tokens: int = 2, first: int = 1, top: int = 1, best: int | None = None) -> PromptLogprobs:
    column, ids = array("f", [-1.0] * tokens).tobytes(), array("i", [1] * tokens).tobytes()
    best_ids = array("i", [1] * (tokens * top if best is None else best)).tobytes()
    return PromptLogprobs(first, top, column, ids, best_ids, column)


def prefill(firsts: tuple[OutputToken, ...] | None = None, **changes: object) -> PrefillResult:
    both = (OutputToken(1, 7, None, 0), OutputToken(1, 8, "stop", 2))
    values: dict[str, object] = {"cached_tokens": 0, "queue_ms": 0.0, "compute_ms": -0.01}
    return PrefillResult(both if firsts is None else firsts, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "event",
    [
        OutputToken(1, 0),
        OutputToken(4, 7, "length", 2),
        OutputToken(2, 7, None, 0, TokenLogprobs(-1.0, 3, (1, 2), (-0.5, -0.6))),
        Started(5, 0.1, 100, 1.0, 0.0),
        scored(),
        scored(3),
        prefill(),
        prefill(prompt_logprobs=(scored(1), scored(2, first=2))),
    ],
)
def test_what_a_worker_may_say(event: DecodeEvent | PrefillResult) -> None:
    assert nonsense(SEQUENCE, event) is None


@pytest.mark.parametrize(
    "event",
    [
        OutputToken(1, 7, None, 1),
        OutputToken(0, 7),
        OutputToken(5, 7),
        OutputToken(4, 7, None),
        OutputToken(1, -1),
        OutputToken(1, 7, None, 0, TokenLogprobs(-1.0, 1, (1, 2), (-0.5,))),
        OutputToken(1, 7, None, 0, TokenLogprobs(NAN, 1)),
        OutputToken(1, 7, None, 0, TokenLogprobs(-1.0, 1, (-1,), (-0.5,))),
        OutputToken(1, 7, None, 0, TokenLogprobs(-1.0, 1, (1,) * 21, (-0.5,) * 21)),
        Started(6, 0.1, 100, 1.0, 0.0),
        Started(1, NAN, 100, 1.0, 0.0),
        Started(1, 0.0, 100, math.inf, 0.0),
        scored(best=3),
        scored(top=2, best=4),
        scored(first=0),
        scored(4),
        prefill(()),
        prefill((OutputToken(1, 7, None, 0),)),
        prefill((OutputToken(1, 7, None, 0),) * 2),
        prefill((OutputToken(1, 7, None, 0), OutputToken(2, 7, None, 2))),
        prefill(cached_tokens=6),
        prefill(compute_ms=NAN),
        prefill(prompt_logprobs=(scored(top=3),)),
    ],
)
def test_what_no_worker_can_mean(event: DecodeEvent | PrefillResult) -> None:
    assert nonsense(SEQUENCE, event)
