"""Clusters for the end-to-end tests: few, shared where that is possible, quiet after every test."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import ClusterSpec, RunningCluster
from tests.support.reference import Reference

SPLIT = ClusterSpec(prefill=1, decode=1, split="always", blocks=1200)
ALONE = ClusterSpec(prefill=0, decode=1, split="never", blocks=1200)


class Clusters:
    """Starts clusters when they are asked for, stops them when their memory is needed."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._started = 0
        self.running: dict[ClusterSpec, RunningCluster] = {}

    def get(self, spec: ClusterSpec) -> RunningCluster:
        if spec not in self.running:
            self._started += 1
            home = self._folder / f"cluster-{self._started}"
            self.running[spec] = RunningCluster(spec, self._model, home)
        return self.running[spec]

    def get_only(self, spec: ClusterSpec) -> RunningCluster:
        """For clusters that need the machine for themselves."""
        for other in self.running.keys() - {spec}:
            self.stop(other)
        return self.get(spec)

    def stop(self, spec: ClusterSpec) -> None:
        assert self.running.pop(spec).stop() == 0

    def stop_all(self) -> None:
        for spec in list(self.running):
            self.stop(spec)


@pytest.fixture(scope="session")
def clusters(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    clusters = Clusters(default_model, tmp_path_factory.mktemp("clusters"))
    yield clusters
    clusters.stop_all()


@pytest.fixture(scope="session")
def reference(default_model: Path) -> Reference:
    return Reference(default_model)


@pytest.fixture
def split(clusters: Clusters) -> RunningCluster:
    """One prefill and one decode worker; every request goes through both."""
    return clusters.get(SPLIT)


@pytest.fixture
def alone(clusters: Clusters) -> RunningCluster:
    """One decode worker that computes its prompts itself."""
    return clusters.get(ALONE)


@pytest.fixture(autouse=True)
async def everything_comes_back(clusters: Clusters) -> AsyncIterator[None]:
    """After every test, whatever it did: no sequence, no used block, no lease, no request is left."""
    yield
    for cluster in clusters.running.values():
        await cluster.await_quiet()
