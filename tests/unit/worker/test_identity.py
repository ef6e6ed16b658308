"""What a worker is follows from its settings and its model; nonsense is refused with the flag's name."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.core.block_hash import chain_root
from services.core.errors import ConfigError
from services.worker.config import WorkerConfig
from services.worker.identity import identify


@pytest.fixture
def config(default_model: Path) -> WorkerConfig:
    return WorkerConfig(model=str(default_model), redis="redis://127.0.0.1:1", role="decode")


def test_the_pool_fills_the_memory_it_is_given(config: WorkerConfig) -> None:
    identity = identify(replace(config, kv_gib=0.5))
    assert identity.geometry.bytes <= 2**29 < identity.geometry.bytes + identity.geometry.block_bytes


def test_the_context_is_bounded_by_the_pool(config: WorkerConfig) -> None:
    assert identify(replace(config, blocks=10)).context_tokens_max == 160
    assert identify(replace(config, blocks=10_000)).context_tokens_max == 8192


def test_every_start_is_a_new_incarnation_of_the_same_model(config: WorkerConfig) -> None:
    one, two = identify(config), identify(config)
    assert one.key != two.key
    assert one.compatibility == two.compatibility


def test_quantised_weights_have_blocks_of_their_own(config: WorkerConfig) -> None:
    exact = identify(replace(config, quantization="none"))
    quantised = identify(replace(config, quantization="int8", kv_cache_dtype="float32"))
    assert exact.compatibility.differences(quantised.compatibility) == ["quantization: none != w4w8a8-g32"]
    assert chain_root(exact.compatibility) != chain_root(quantised.compatibility)


def test_kv_of_8_bits_has_blocks_of_its_own_and_four_times_as_many(config: WorkerConfig) -> None:
    config = replace(config, quantization="int8")
    wide, narrow = (identify(replace(config, kv_cache_dtype=dtype)) for dtype in ("float32", "int8"))
    assert wide.compatibility.differences(narrow.compatibility) == ["kv_dtype: float32 != int8-spread"]
    assert chain_root(wide.compatibility) != chain_root(narrow.compatibility)
    assert 3.7 < narrow.geometry.blocks / wide.geometry.blocks < 4
    assert identify(config).compatibility == narrow.compatibility


def test_what_auto_becomes_is_what_a_worker_is_known_by(config: WorkerConfig) -> None:
    auto = identify(config).compatibility
    assert auto in [identify(replace(config, quantization=n)).compatibility for n in ("none", "int8")]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"redis": ""}, "--redis"),
        ({"block_size": 0}, "--block-size"),
        ({"kv_gib": 0.0001}, "--kv-gib"),
        ({"chunk_tokens_max": 0}, "--chunk-tokens-max"),
        ({"lease_ttl_s": -1.0}, "--lease-ttl-s"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: WorkerConfig, change: dict[str, object], flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        identify(replace(config, **change))  # type: ignore[arg-type]
