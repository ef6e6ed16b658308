"""Reports of other versions of Diptych can be read, as far as they go."""

import msgspec

from router.step_model import StepModel
from services.core.block_hash import Compatibility
from services.core.worker_report import WorkerReport, sequence_tag

REPORT = WorkerReport(
    worker_id="w",
    epoch=1,
    role="both",
    state="ready",
    address="127.0.0.1:1",
    served_model="m",
    compatibility=Compatibility(model="m", revision="r", layout="l"),
    context_tokens_max=2048,
    queued_prefill_context=70,
    running_context=300,
    model=StepModel(step=2.5, token=0.1, token_context=1e-7),
    newest=[sequence_tag("r-1")],
)


def test_a_report_travels_as_it_is():
    assert msgspec.json.decode(msgspec.json.encode(REPORT), type=WorkerReport) == REPORT


def test_a_report_without_a_step_model_has_no_samples():
    fields = msgspec.to_builtins(REPORT)
    for unknown_to_older in ("queued_prefill_context", "running_context", "model", "newest"):
        del fields[unknown_to_older]
    older = msgspec.json.encode({**fields, "prefill_ms_per_token": 1.5, "decode_step_ms": 20.0})
    report = msgspec.json.decode(older, type=WorkerReport)
    assert (report.model, report.queued_prefill_context, report.newest) == (None, 0, [])


def test_a_step_model_of_another_version_is_read_as_far_as_it_goes():
    fields = msgspec.to_builtins(REPORT)
    fields["model"] = {"step": 2.5, "token": 0.1, "token_squared": 1e-9}
    report = msgspec.json.decode(msgspec.json.encode(fields), type=WorkerReport)
    assert report.model == StepModel(step=2.5, token=0.1)
