"""Clusters for the end-to-end tests: few, shared where that is possible, quiet after every test.

They compute as a user's do, with 8-bit weights where those can be had; what is compared with transformers
asks a cluster in float32. Tests of the same clusters run one after the other: each is started once.
"""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.cluster import ClusterSpec, RunningCluster
from tests.support.reference import Reference

SPLIT = ClusterSpec(prefill=1, decode=1, split="always", blocks=1200)
ALONE = ClusterSpec(prefill=0, decode=1, split="never", blocks=1200)
EXACT_SPLIT = replace(SPLIT, compiler=False)
EXACT_ALONE = replace(ALONE, quantization="none")
TWO_AND_TWO = ClusterSpec(prefill=2, decode=2, split="always", blocks=400)
# Of the fixtures below; tests with clusters of their own come last.
ORDER = ({"split", "alone"}, {"exact_split", "exact_alone"}, {"two_and_two"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [at for at, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    for at, item in zip(ours, sorted((items[at] for at in ours), key=_place_in_order), strict=True):
        items[at] = item


def _place_in_order(item: pytest.Item) -> int:
    used = set(getattr(item, "fixturenames", ()))
    return next((place for place, shared in enumerate(ORDER) if used & shared), len(ORDER))


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

    def get_only(self, spec: ClusterSpec, *beside: ClusterSpec) -> RunningCluster:
        """For clusters that need the machine for themselves, and those that are used beside them."""
        for other in self.running.keys() - {spec, *beside}:
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


@pytest.fixture
def exact_split(clusters: Clusters) -> RunningCluster:
    """`split` in float32, for want of a compiler."""
    return clusters.get_only(EXACT_SPLIT, EXACT_ALONE)


@pytest.fixture
def exact_alone(clusters: Clusters) -> RunningCluster:
    """`alone` in float32, because it is told so."""
    return clusters.get_only(EXACT_ALONE, EXACT_SPLIT)


@pytest.fixture
def two_and_two(clusters: Clusters) -> RunningCluster:
    """One of each kind may die."""
    return clusters.get_only(TWO_AND_TWO)


@pytest.fixture(autouse=True)
async def everything_comes_back(clusters: Clusters) -> AsyncIterator[None]:
    """After every test, whatever it did: no sequence, no used block, no lease, no request is left."""
    yield
    for cluster in clusters.running.values():
        await cluster.await_quiet()
