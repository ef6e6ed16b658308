"""A worker's HTTP side: metrics, yes-or-no checks, and 404 for the rest."""

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from services.worker.http import StatusServer


@pytest.fixture
def url() -> Iterator[str]:
    registry = CollectorRegistry()
    Gauge("diptych_example", "An example", registry=registry).set(7)
    server = StatusServer(
        "127.0.0.1", 0, registry, {"/health/live": lambda: True, "/health/ready": lambda: False}
    )
    yield f"http://127.0.0.1:{server.port}"
    server.close()


@pytest.mark.parametrize(
    ("path", "status"),
    [("/metrics", 200), ("/health/live", 200), ("/health/ready", 503), ("/secrets", 404)],
)
def test_paths_answer_with_their_status(url: str, path: str, status: int) -> None:
    assert httpx.get(url + path).status_code == status


def test_metrics_are_in_the_prometheus_text_format(url: str) -> None:
    assert "diptych_example 7.0" in httpx.get(url + "/metrics").text
