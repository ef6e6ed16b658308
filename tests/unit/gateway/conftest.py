"""What the gateway's tests share: the default model's tokenizer, and whole gateways in memory."""

from contextlib import AsyncExitStack

import pytest

from services.gateway.config import GatewayConfig
from services.gateway.served_model import ServedModel
from services.model.files import ModelFiles, open_model
from services.model.tokenizer import Tokenizer
from tests.unit.gateway.in_memory_cluster import ANSWER, InMemoryCluster, four_workers


@pytest.fixture(scope="session")
def model_files(default_model) -> ModelFiles:
    return open_model(default_model)


@pytest.fixture(scope="session")
def tokenizer(model_files: ModelFiles) -> Tokenizer:
    return model_files.tokenizer()


@pytest.fixture(scope="session")
def served_model(model_files: ModelFiles) -> ServedModel:
    return ServedModel.of(model_files)


@pytest.fixture
def network() -> bool:
    """Whether clusters are served by uvicorn on a free port; modules override it to be faster."""
    return True


@pytest.fixture
async def start_cluster(served_model: ServedModel, network: bool):
    """`await start_cluster(config fields...)`, any number of times in a test."""
    async with AsyncExitStack() as stack:

        async def start(*, reports=None, answer: str = ANSWER, locks=None, **config) -> InMemoryCluster:
            config = {
                "route_split": "always",
                "seed": 7,
                "admission_timeout_s": 0.5,
                "no_worker_timeout_s": 0.5,
                **config,
            }
            cluster = InMemoryCluster(served_model, GatewayConfig(**config), answer, locks)
            reports = four_workers() if reports is None else reports
            return await stack.enter_async_context(cluster.serving(*reports, network=network))

        yield start


@pytest.fixture
async def cluster(start_cluster) -> InMemoryCluster:
    return await start_cluster()
