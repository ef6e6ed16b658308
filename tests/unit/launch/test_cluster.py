"""A cluster that cannot start says why, and leaves nothing behind."""

from pathlib import Path

import psutil
import pytest

from services.core.config import load_config
from services.core.errors import ConfigError, DiptychError, WorkerLost
from services.gateway.config import GatewayConfig
from services.launch.cluster import ClusterPlan, LocalCluster, claim_port
from services.launch.display import Display
from services.worker.config import WorkerConfig


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
    cluster = LocalCluster(plan(tmp_path), Display())
    failure = await failure_of(cluster)
    assert isinstance(failure, WorkerLost)
    assert "exited with code 1 at start; its last lines were:" in failure.message
    assert str(tmp_path / "broken.gguf") in failure.message
    assert set(psutil.Process().children(recursive=True)) <= before
    assert cluster._cores is not None
    assert not cluster._cores.path.exists()


async def test_the_logs_of_the_cluster_before_are_kept(tmp_path: Path) -> None:
    for _ in range(2):
        await failure_of(LocalCluster(plan(tmp_path), Display()))
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert names == {"decode-0.log", "decode-0.log.1", "gateway.log", "gateway.log.1"}


async def test_an_unusable_redis_url_is_refused(tmp_path: Path) -> None:
    failure = await failure_of(LocalCluster(plan(tmp_path, redis="http://127.0.0.1:1"), Display()))
    assert isinstance(failure, ConfigError)


async def test_the_password_of_redis_is_in_no_command_line_and_the_children_get_the_url(
    tmp_path: Path,
) -> None:
    url = "redis://:secret@127.0.0.1:1"
    cluster = LocalCluster(plan(tmp_path, redis=url), Display())
    await failure_of(cluster)
    assert cluster._gateway is not None
    worker, gateway = cluster._workers[0].spec, cluster._gateway.spec
    assert [part for part in (*worker.command, *gateway.command) if "secret" in part] == []
    for kind, section, spec in ((WorkerConfig, "worker", worker), (GatewayConfig, "gateway", gateway)):
        settings = {name: text for name, text in spec.environment.items() if "__" in name}
        assert load_config(kind, section, environ=settings, flags={}).redis == url
