"""Rotary position embedding in the half-rotation (NeoX, Hugging Face) convention.

    angle[j]       = position * frequency[j]          frequency[j] = theta^(-2j / dim),  j < dim / 2
    y[j]           = x[j] * cos(angle[j]) - x[j + dim/2] * sin(angle[j])
    y[j + dim/2]   = x[j + dim/2] * cos(angle[j]) + x[j] * sin(angle[j])

Sources: Su et al., "RoFormer", 2021; Chen et al., "Extending Context Window of Large Language Models
via Positional Interpolation", 2023 (linear scaling); Meta, `apply_scaling` in llama-models (llama3).
"""

import math

import torch
from torch import Tensor


def rope_frequencies(dim: int, theta: float) -> Tensor:
    """Radians per position, float32 [dim / 2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def scale_linear(frequencies: Tensor, factor: float) -> Tensor:
    """Stretches every wavelength by `factor`."""
    return frequencies / factor


def scale_llama3(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> Tensor:
    """Stretches wavelengths by `factor` if they turn less than `low_freq_factor` times in the original
    context, not at all if more than `high_freq_factor` times, and smoothly between.
    """
    turns = original_context * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


def rope_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The table for `apply_rope`: cosines and signed sines of int64 [tokens], each [tokens, 1, dim].

    Angles are computed in float32; half-precision positions would be wrong from 257 on.
    """
    angles = positions.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    cosines = torch.cat((cos, cos), dim=-1).to(dtype)
    signed_sines = torch.cat((-sin, sin), dim=-1).to(dtype)
    return cosines.unsqueeze(1), signed_sines.unsqueeze(1)


def apply_rope(x: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Rotates every head of `x` [tokens, heads, dim] by its token's angles."""
    half = x.shape[-1] // 2
    # `roll` would say the same, but torch.compile makes a loop of single elements of it: 30 times slower.
    swapped_halves = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cosines, swapped_halves, signed_sines)
