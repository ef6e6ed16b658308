"""Between the worker client's values and protobuf messages: what proto/worker.proto says, in ours."""

from services.core.errors import DiptychError, from_label
from services.core.worker_report import WorkerReport
from services.gateway.workers.worker_client import (
    DecodeEvent,
    OutputToken,
    PrefillResult,
    Reserved,
    Sequence,
    Started,
)
from services.wire.convert import (
    finish_from_wire,
    logprobs_from_wire,
    prompt_logprobs_from_wire,
    sampling_to_wire,
)
from services.wire.generated import worker_pb2


def sequence_to_wire(sequence: Sequence) -> worker_pb2.Sequence:
    wire = worker_pb2.Sequence(
        request_id=sequence.request_id,
        attempt=sequence.attempt,
        prompt_ids=sequence.prompt_ids,
        output_ids=sequence.output_ids,
        sampling=sampling_to_wire(sequence.sampling),
        salt=sequence.salt,
        choice_ids=sequence.choices,
    )
    if prefix := sequence.prefix:
        wire.prefix.CopyFrom(
            worker_pb2.PrefixSource(worker=_source_to_wire(prefix.worker), tokens=prefix.tokens)
        )
    return wire


def submit_command(
    worker: WorkerReport, sequence: Sequence, source: WorkerReport | None
) -> worker_pb2.DecodeCommand:
    submit = worker_pb2.DecodeSubmit(sequence=sequence_to_wire(sequence), epoch=worker.epoch)
    if source is not None:
        submit.source.CopyFrom(_source_to_wire(source))
    return worker_pb2.DecodeCommand(submit=submit)


def cancel_command(sequence: Sequence, *choices: int) -> worker_pb2.DecodeCommand:
    """Cancels all of them if no choice is named."""
    cancel = worker_pb2.DecodeCancel(
        request_id=sequence.request_id, attempt=sequence.attempt, choice_ids=choices
    )
    return worker_pb2.DecodeCommand(cancel=cancel)


def token_from_wire(wire: worker_pb2.SampledToken) -> OutputToken:
    return OutputToken(
        wire.index, wire.token, finish_from_wire(wire.finish), wire.choice, logprobs_from_wire(wire)
    )


def prefill_from_wire(wire: worker_pb2.PrefillReply) -> PrefillResult:
    return PrefillResult(
        tuple(map(token_from_wire, wire.firsts)),
        wire.cached_tokens,
        wire.queue_ms,
        wire.compute_ms,
        wire.fetched_tokens,
        wire.fetch_ms,
        tuple(map(prompt_logprobs_from_wire, wire.prompt_logprobs)),
    )


def event_from_wire(wire: worker_pb2.DecodeEvent) -> DecodeEvent | DiptychError | None:
    """The event, the error that a failure carries, or None for a kind that a newer worker sends."""
    match wire.WhichOneof("event"):
        case "reserved":
            return Reserved()
        case "started":
            s = wire.started
            return Started(
                s.cached_tokens,
                s.queue_ms,
                s.transferred_bytes,
                s.transfer_ms,
                s.exposed_ms,
                s.fetched_tokens,
                s.fetch_ms,
            )
        case "token":
            return token_from_wire(wire.token)
        case "prompt_logprobs":
            return prompt_logprobs_from_wire(wire.prompt_logprobs)
        case "failure":
            return from_label(wire.failure.code, wire.failure.message)
    return None


def _source_to_wire(worker: WorkerReport) -> worker_pb2.KvSource:
    return worker_pb2.KvSource(worker_id=worker.worker_id, address=worker.address, epoch=worker.epoch)
