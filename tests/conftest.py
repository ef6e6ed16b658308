"""Fixtures that tests of several packages share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.redis_binary import NoRedis
from tests.support.redis_servers import RedisServers

# The time of one example says more about the machine's other work than about ours.
settings.register_profile("diptych", deadline=None)
settings.load_profile("diptych")


@pytest.fixture(scope="session")
def redis_servers() -> Iterator[RedisServers]:
    """Real servers for the whole run: take a namespace of your own, and never kill one."""
    with RedisServers() as servers:
        yield servers


@pytest.fixture(scope="session")
def redis_url(redis_servers: RedisServers) -> Callable[[str], str]:
    """The URL of the server of a kind; skips the test if this machine cannot have one."""

    def url(kind: str) -> str:
        try:
            return redis_servers.url(kind)
        except NoRedis as error:
            pytest.skip(f"no {kind} here: {error}")

    return url


@pytest.fixture(scope="session")
def valkey_url(redis_servers: RedisServers) -> str:
    return redis_servers.url("valkey")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The GGUF file of the default model, downloaded once per machine."""
    from services.model.pull import ensure_default_model

    return ensure_default_model()
