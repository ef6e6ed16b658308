"""What the fuzzed gateway is served with."""

from pathlib import Path

import pytest

from services.gateway.served_model import ServedModel
from services.model.files import open_model


@pytest.fixture(scope="session")
def model(default_model: Path) -> ServedModel:
    """The default model's name and tokenizer, without its weights."""
    return ServedModel.of(open_model(default_model))
