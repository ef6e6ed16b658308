"""Forty seconds of chaos: whatever dies, no request fails and every answer is the undisturbed one."""

from pathlib import Path

from tests.chaos.run import TWO_AND_TWO, ChaosPlan, run_chaos
from tests.support.cluster import RunningCluster

# About 60 s with the start, the undisturbed answers and the quiet afterwards. A part that dies often is
# restarted later and later: with a fault every 4 s no worker has to be waited for at the end.
FORTY_SECONDS = ChaosPlan(seconds=40, seed=1, fault_every_s=4.0, pool=12)


async def test_no_request_fails_and_no_answer_changes_while_parts_die(
    default_model: Path, tmp_path: Path
) -> None:
    cluster = RunningCluster(TWO_AND_TWO, default_model, tmp_path / "home")
    try:
        report = await run_chaos(cluster, FORTY_SECONDS)
    finally:
        cluster.stop()
    print(report)
    assert report.violations == []
    assert report.resumed > 0, "no fault hit an answer"
    assert report.several > 0, "no answer had several choices"
    assert len(report.faults) >= 5, "too few kinds of faults struck"
