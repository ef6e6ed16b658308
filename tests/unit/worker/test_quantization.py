"""What `--quantization auto` becomes: int8 where that is possible, else none, with the reason."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from kernels.cpu.build import COMPILERS, processor_level
from services.core.errors import ConfigError
from services.launch.cli import main
from services.worker.config import WorkerConfig
from services.worker.quantization import choose_kv_dtype, choose_quantization

has_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")


def nothing_is_built() -> None:
    raise AssertionError("nothing needs to be built")


@has_compiler
@pytest.mark.parametrize("demanded", ["auto", "int8"])
def test_a_cpu_with_float32_has_8_bit_weights(demanded: Any) -> None:
    chosen = choose_quantization(WorkerConfig(quantization=demanded), lambda: None)
    assert (chosen.name, chosen.slower) == ("int8", False)
    assert str(chosen) == f"quantization: int8 (C++ kernels for {processor_level()})"
    assert choose_quantization(WorkerConfig(quantization=demanded), nothing_is_built) == chosen


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_auto_is_none_with_the_remedy_and_the_price() -> None:
    chosen = choose_quantization(WorkerConfig(), nothing_is_built)
    assert (chosen.name, chosen.slower) == ("none", True)
    (line,) = str(chosen).splitlines()
    assert line.startswith("warning: no 8-bit weights, so steps take 2 to 6 times as long")
    assert "no-such-compiler" in line
    assert "apt install g++" in line


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_int8_that_is_demanded_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--quantization int8: .*no-such-compiler.*--quantization none"):
        choose_quantization(WorkerConfig(quantization="int8"), nothing_is_built)
    assert main(["kernels", "build"]) == 2
    assert "no-such-compiler" in capsys.readouterr().err


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "settings",
    [{"device": "cuda"}, {"dtype": "bfloat16"}, {"quantization": "none"}, {"compile": True}],
    ids=str,
)
def test_where_int8_is_not_for_it_is_no_loss_and_needs_no_compiler(settings: dict[str, Any]) -> None:
    chosen = choose_quantization(WorkerConfig(**settings), nothing_is_built)
    assert (chosen.name, chosen.slower) == ("none", False)


def test_8_bit_weights_have_nothing_that_torch_could_compile() -> None:
    with pytest.raises(ConfigError, match=r"--quantization int8.*Leave --compile out"):
        choose_quantization(WorkerConfig(quantization="int8", compile=True), nothing_is_built)


@pytest.mark.parametrize(
    ("quantization", "settings", "dtype"),
    [
        ("int8", {}, "int8"),
        ("int8", {"kv_cache_dtype": "float32"}, "float32"),
        ("none", {}, "float32"),
        ("none", {"dtype": "bfloat16"}, "bfloat16"),
        ("none", {"kv_cache_dtype": "float32"}, "float32"),
    ],
)
def test_kv_has_8_bits_beside_8_bit_weights_unless_told_otherwise(
    quantization: str, settings: dict[str, Any], dtype: str
) -> None:
    assert choose_kv_dtype(WorkerConfig(**settings), quantization) == dtype


@pytest.mark.parametrize(
    ("quantization", "settings", "flag"),
    [
        ("none", {"kv_cache_dtype": "int8"}, "--kv-cache-dtype int8 needs .*--quantization int8"),
        ("none", {"kv_cache_dtype": "float32", "dtype": "float16"}, r"--dtype \(float16\)"),
        ("int8", {"dtype": "bfloat16"}, "--dtype float32, not bfloat16"),
    ],
)
def test_kv_of_a_type_that_cannot_be_is_refused(
    quantization: str, settings: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        choose_kv_dtype(WorkerConfig(**settings), quantization)
