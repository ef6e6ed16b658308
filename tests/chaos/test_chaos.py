"""A minute of chaos: whatever dies, no request fails and every answer is the undisturbed one."""

from pathlib import Path

from tests.chaos.run import TWO_AND_TWO, ChaosPlan, run_chaos
from tests.support.cluster import RunningCluster

MINUTE = ChaosPlan(seconds=60, seed=1, fault_every_s=2.5, pool=12)


async def test_no_request_fails_and_no_answer_changes_while_parts_die(
    default_model: Path, tmp_path: Path
) -> None:
    cluster = RunningCluster(TWO_AND_TWO, default_model, tmp_path / "home")
    try:
        report = await run_chaos(cluster, default_model, MINUTE)
    finally:
        cluster.stop()
    print(report)
    assert report.violations == []
    assert report.resumed > 0, "no fault hit an answer"
    assert len(report.faults) >= 5, "too few kinds of faults struck"
