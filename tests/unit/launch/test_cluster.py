"""A cluster that cannot start says why, and leaves nothing behind."""

from pathlib import Path

import psutil
import pytest

from services.core.errors import ConfigError, DiptychError, WorkerLost
from services.launch.cluster import ClusterPlan, LocalCluster, claim_port
from services.launch.display import Display


def plan(tmp_path: Path, redis: str = "") -> ClusterPlan:
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"not a model")
    return ClusterPlan(
        prefill=0,
        decode=1,
        host="127.0.0.1",
        port=claim_port("127.0.0.1", 0),
        model=model,
        dtype="float32",
        logs=tmp_path / "logs",
        redis=redis,
        blocks=16,
    )


async def failure_of(cluster: LocalCluster) -> DiptychError:
    try:
        with pytest.raises(DiptychError) as caught:
            await cluster.start()
    finally:
        await cluster.stop()
    return caught.value


async def test_a_worker_that_cannot_start_is_quoted_and_everything_is_stopped(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    failure = await failure_of(LocalCluster(plan(tmp_path), Display()))
    assert isinstance(failure, WorkerLost)
    assert "exited with code 1 at start; its last lines were:" in failure.message
    assert str(tmp_path / "broken.gguf") in failure.message
    assert set(psutil.Process().children(recursive=True)) <= before


async def test_the_logs_of_the_cluster_before_are_kept(tmp_path: Path) -> None:
    for _ in range(2):
        await failure_of(LocalCluster(plan(tmp_path), Display()))
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert names == {"decode-0.log", "decode-0.log.1", "gateway.log", "gateway.log.1"}


async def test_an_unusable_redis_url_is_refused(tmp_path: Path) -> None:
    failure = await failure_of(LocalCluster(plan(tmp_path, redis="http://127.0.0.1:1"), Display()))
    assert isinstance(failure, ConfigError)
