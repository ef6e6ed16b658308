"""Which workers can share requests, one with the prompt and one with the answer, and why others cannot."""

from collections.abc import Sequence

from services.core.worker_report import WorkerReport


def unpaired(reports: Sequence[WorkerReport]) -> dict[str, str]:
    """Workers that find others for the part that they lack, but none that KV can move to or from: why, by id.

    Such a decode worker computes its prompts itself; such a prefill worker has nothing to do.
    """
    why = {report.worker_id: _obstacle(report, reports) for report in reports}
    return {worker_id: obstacle for worker_id, obstacle in why.items() if obstacle}


def _obstacle(report: WorkerReport, reports: Sequence[WorkerReport]) -> str:
    """What keeps it from the first that could be its partner; empty if it has a partner, or there is none."""
    partners = [other for other in reports if other is not report and _complement(report, other)]
    differences = [report.compatibility.differences(other.compatibility) for other in partners]
    if not all(differences) or not partners:
        return ""
    return f"no KV can move between it and {partners[0].worker_id}: {'; '.join(differences[0])}"


def _complement(one: WorkerReport, other: WorkerReport) -> bool:
    return (one.prefills and other.decodes) or (one.decodes and other.prefills)
