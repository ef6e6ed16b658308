"""What flows through the request path: a validated request going down, events coming up.

Generation ──>  attempts  ──>  pipeline  ──>  dispatch  ──>  workers
TextDelta  <──  answer  <──  Routed, PrefillResult, Started, OutputToken, AttemptFailed

Events and deltas come up in bursts, lists of what is there at the same time: a slow client, or workers that
are faster than this process, make bursts longer, and each costs little more than a single token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from router.state import Route, RouteKind
from services.core.errors import DiptychError
from services.core.logprobs import PromptLogprobs
from services.core.sampling import SamplingParams
from services.core.worker_report import WorkerKey, WorkerReport
from services.gateway.admission.fair_queue import Priority
from services.gateway.text.tool_calls.tool_use import ToolUse
from services.gateway.workers.worker_client import (
    OutputToken,
    PrefillResult,
    PrefixSource,
    Reserved,
    Sequence,
    Started,
)


@dataclass(frozen=True, slots=True)
class Generation:
    """A request as tokens. Everything random in it is drawn, so attempts repeat each other."""

    request_id: str  # ours: unique in the cluster
    prompt_ids: list[int]
    sampling: SamplingParams
    deadline: float  # on the gateway's clock
    ttft_max_s: float | None = None  # later than that the client does not want it; None: as configured
    priority: Priority = Priority.NORMAL
    tenant: str = ""  # whose it is: Tenant.id
    salt: str = ""  # Tenant.salt: only prompts with the same one share KV
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    shows_stop: bool = False  # a stop string or stop token is a part of the text
    echo: str | None = None  # the prompt's text, if the answers begin with it
    wants_answer: bool = True  # False: only the prompt is shown
    kept_tokens: frozenset[int] = frozenset()  # special tokens that are text all the same
    choices: int = 1  # answers that the client wants
    tools: ToolUse | None = None  # whose calls are looked for in the answers

    @property
    def shows_prompt(self) -> bool:
        return self.echo is not None or self.sampling.prompt_logprobs is not None

    def sequence(self, attempt: int, choices: tuple[int, ...], delivered: list[int]) -> Sequence:
        """One attempt at `choices`, which all have delivered the same tokens. With the first of them came
        what there is to know of the prompt."""
        sampling = self.sampling
        if delivered and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return Sequence(
            request_id=self.request_id,
            attempt=attempt,
            prompt_ids=self.prompt_ids,
            output_ids=list(delivered),
            sampling=sampling,
            salt=self.salt,
            choices=choices,
        )


@dataclass(frozen=True, slots=True)
class Routed:
    """Where an attempt goes. No prefill worker: the decode worker computes the prompt itself."""

    route: Route
    prefill: WorkerReport | None
    decode: WorkerReport | None
    prefix: PrefixSource | None = None  # what the one that computes the prompt may fetch

    @property
    def kind(self) -> RouteKind:
        return self.route.kind


class WorkerPair(NamedTuple):
    prefill: WorkerKey
    decode: WorkerKey


Excluded = WorkerKey | WorkerPair  # what a next attempt avoids


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The last event of an attempt that did not finish its choices."""

    error: DiptychError
    culprit: WorkerReport | None = None
    pair: WorkerPair | None = None  # they did not find each other: neither may be at fault
    others_go_on: bool = False  # other choices of the request have attempts of their own

    @property
    def to_avoid(self) -> Excluded | None:
        return self.pair or (self.culprit.key if self.culprit else None)


WorkerEvent = PrefillResult | Reserved | Started | PromptLogprobs | OutputToken
Event = Routed | WorkerEvent | AttemptFailed
