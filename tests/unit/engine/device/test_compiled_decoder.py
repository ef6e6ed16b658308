"""What torch compiles computes what it computes as it is, and is compiled before the first request."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from services.core.errors import ConfigError
from services.engine.device.torch_runner import TorchRunner
from services.model.files import open_model
from tests.unit.engine.device.tiny_models import Driver, open_torch, random_model


@pytest.fixture(autouse=True)
def _compiler_as_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def open_compiled(path: Path) -> TorchRunner:
    files = open_model(path)
    return TorchRunner(files, files.config.pool_geometry(64, 8), None, threads=1, compiled=True)


def test_it_is_compiled_once_and_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    random_model("qwen3").save_pretrained(tmp_path)
    compiled, plain = open_compiled(tmp_path), open_torch(tmp_path)
    torch.compiler.set_stance("fail_on_recompile")
    tokens, chunks = torch.randint(0, 199, (60,)).tolist(), [40, 1, 3, *[1] * 16]
    assert torch.allclose(
        Driver(compiled).logits(tokens, chunks), Driver(plain).logits(tokens, chunks), atol=1e-4
    )
    drivers = [Driver(compiled, range(8 * at, 8 * at + 8)) for at in range(5)]
    rows = [driver.row(tokens[at : at + 1 + 2 * at], 0) for at, driver in enumerate(drivers)]
    alone = torch.cat([compiled.logits([row]) for row in rows])
    assert torch.allclose(compiled.logits(rows), alone, atol=1e-5)


def test_without_a_compiler_it_is_refused_with_the_remedy(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"--compile.*g\+\+"),
    ):
        open_compiled(tmp_path)
