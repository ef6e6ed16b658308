"""Fixtures that tests of several packages share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from services.store.embedded import EmbeddedValkey

# The time of one example says more about the machine's other work than about ours.
settings.register_profile("diptych", deadline=None)
settings.load_profile("diptych")


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A real Valkey server for the whole run: take a namespace of your own, and never kill it."""
    with EmbeddedValkey() as valkey:
        yield valkey.url


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The GGUF file of the default model, downloaded once per machine."""
    from services.model.pull import ensure_default_model

    return ensure_default_model()
