import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels.reference.rope import apply_rope, rope_angles, rope_frequencies, scale_linear, scale_llama3

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("dim", [2, 6, 64])
def test_each_pair_of_dimensions_turns_by_position_times_frequency(dim: int) -> None:
    positions = torch.tensor([0, 1, 17, 5000])
    x = torch.randn(4, 3, dim)
    y = apply_rope(x, *rope_angles(positions, rope_frequencies(dim, 10000.0), torch.float32))
    half = dim // 2
    before = torch.complex(x[..., :half].double(), x[..., half:].double())
    after = torch.complex(y[..., :half].double(), y[..., half:].double())
    for pair in range(half):
        angle = positions.double() * 10000.0 ** (-2 * pair / dim)
        turned = before[..., pair] * torch.polar(torch.ones(4).double(), angle)[:, None]
        assert torch.allclose(after[..., pair], turned, atol=2e-3)  # float32 angles near 5000 radians


def test_rotation_equals_that_of_transformers() -> None:
    positions = torch.arange(50)
    q, k = torch.randn(50, 4, 16), torch.randn(50, 2, 16)
    frequencies = rope_frequencies(16, 500.0)
    angles = torch.cat([positions[:, None] * frequencies] * 2, dim=-1)
    expected_q, expected_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], angles.cos()[None], angles.sin()[None]
    )
    table = rope_angles(positions, frequencies, torch.float32)
    assert torch.allclose(apply_rope(q, *table), expected_q[0].transpose(0, 1), atol=1e-6)
    assert torch.allclose(apply_rope(k, *table), expected_k[0].transpose(0, 1), atol=1e-6)


def test_scaled_frequencies_equal_those_of_transformers() -> None:
    frequencies = rope_frequencies(128, 500000.0)
    config = LlamaConfig(
        head_dim=128,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "original_max_position_embeddings": 8192,
            **LLAMA3,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    scaled = scale_llama3(frequencies, original_context=8192, **LLAMA3)
    assert torch.allclose(scaled, expected, rtol=1e-5)
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](config, torch.device("cpu"))
    assert torch.allclose(scale_linear(frequencies, 4.0), expected, rtol=1e-6)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    frequencies = rope_frequencies(128, 500000.0)
    scaled = scale_llama3(frequencies, original_context=8192, **LLAMA3)
    waves = 2 * math.pi / frequencies
    assert torch.equal(scaled[waves < 8192 / 4], frequencies[waves < 8192 / 4])
    assert torch.allclose(scaled[waves > 8192], frequencies[waves > 8192] / 8)
    assert bool((scaled.diff() < 0).all())


def test_half_precision_angles_are_computed_in_float32() -> None:
    positions = torch.tensor([4001])
    frequencies = rope_frequencies(8, 10000.0)
    wide, _ = rope_angles(positions, frequencies, torch.float32)
    narrow, _ = rope_angles(positions, frequencies, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())
