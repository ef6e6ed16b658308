"""Between protobuf messages and the core vocabulary, both ways. Field names are the same."""

import re

from services.core.block_hash import Compatibility
from services.core.errors import BadRequest
from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import FinishReason, SamplingParams
from services.wire.generated import transfer_pb2, worker_pb2

NAME_CHARACTERS_MAX = 512  # of requests, transfers, workers, salts
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[0-9A-Za-z._-]+|[0-9A-Fa-f:]+):[0-9]{1,5}")

_FINISH_TO_WIRE: dict[FinishReason | None, worker_pb2.FinishReason] = {
    None: worker_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": worker_pb2.FINISH_REASON_STOP,
    "length": worker_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_WIRE = {wire: finish for finish, wire in _FINISH_TO_WIRE.items()}


def finish_to_wire(finish: FinishReason | None) -> worker_pb2.FinishReason:
    return _FINISH_TO_WIRE[finish]


def finish_from_wire(finish: worker_pb2.FinishReason) -> FinishReason | None:
    """A reason that only a newer peer knows ends the answer like any other: as a stop."""
    return _FINISH_FROM_WIRE.get(finish, "stop")


def sampled_to_wire(
    index: int, token: int, finish: FinishReason | None, choice: int, logprobs: TokenLogprobs | None = None
) -> worker_pb2.SampledToken:
    return worker_pb2.SampledToken(
        index=index,
        token=token,
        finish=finish_to_wire(finish),
        choice=choice,
        logprobs=None if logprobs is None else _logprobs_to_wire(logprobs),
    )


def logprobs_from_wire(token: worker_pb2.SampledToken) -> TokenLogprobs | None:
    if not token.HasField("logprobs"):
        return None
    wire = token.logprobs
    return TokenLogprobs(wire.logprob, wire.rank, tuple(wire.top_ids), tuple(wire.top_logprobs))


def _logprobs_to_wire(value: TokenLogprobs) -> worker_pb2.TokenLogprobs:
    return worker_pb2.TokenLogprobs(**{name: getattr(value, name) for name in value.__struct_fields__})


def prompt_logprobs_to_wire(value: PromptLogprobs) -> worker_pb2.PromptLogprobs:
    return worker_pb2.PromptLogprobs(**{name: getattr(value, name) for name in value.__struct_fields__})


def prompt_logprobs_from_wire(wire: worker_pb2.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(**{name: getattr(wire, name) for name in PromptLogprobs.__struct_fields__})


def choices_from_wire(wire: worker_pb2.Sequence) -> tuple[int, ...]:
    return tuple(wire.choice_ids) or (0,)


def sampling_to_wire(params: SamplingParams) -> worker_pb2.SamplingParams:
    values = {name: getattr(params, name) for name in params.__struct_fields__}
    values["bad_words"] = [worker_pb2.TokenIds(ids=ids) for ids in params.bad_words]
    return worker_pb2.SamplingParams(**values)


def sampling_from_wire(wire: worker_pb2.SamplingParams) -> SamplingParams:
    values = {name: getattr(wire, name) for name in SamplingParams.__struct_fields__}
    for name in ("end_token_ids", "allowed_token_ids"):
        values[name] = tuple(values[name])
    for name in ("top_logprobs", "prompt_logprobs"):
        values[name] = values[name] if wire.HasField(name) else None
    values["logit_bias"] = dict(wire.logit_bias)
    values["bad_words"] = tuple(tuple(word.ids) for word in wire.bad_words)
    params = SamplingParams(**values)
    if params.max_tokens < 1:
        raise BadRequest("sampling.max_tokens must be at least 1", "max_tokens")
    return params


def compatibility_to_wire(value: Compatibility) -> transfer_pb2.Compatibility:
    return transfer_pb2.Compatibility(**{name: getattr(value, name) for name in value.__struct_fields__})


def compatibility_from_wire(wire: transfer_pb2.Compatibility) -> Compatibility:
    return Compatibility(**{name: getattr(wire, name) for name in Compatibility.__struct_fields__})


def check_name(text: str, param: str) -> None:
    """Of something that is remembered by it. Raises BadRequest for one that is empty or very long."""
    if not 0 < len(text) <= NAME_CHARACTERS_MAX:
        raise BadRequest(f"{param} must have 1 to {NAME_CHARACTERS_MAX} characters", param)


def source_from_wire(wire: worker_pb2.KvSource) -> tuple[str, str, int]:
    """Worker, address and epoch. Raises BadRequest for an address that is not host:port: gRPC would take
    unix:/path and other schemes, too."""
    check_name(wire.worker_id, "source.worker_id")
    check_name(wire.address, "source.address")
    if not _ADDRESS.fullmatch(wire.address):
        raise BadRequest(f"a worker's address is host:port, not {wire.address!r}", "source.address")
    return wire.worker_id, wire.address, wire.epoch


def attempt_id(request_id: str, attempt: int) -> str:
    """One attempt of one request: the name of its sequence on every worker and of its transfer."""
    return f"{request_id}/{attempt}"
