"""How a GGUF file states RoPE scaling: as metadata (none, linear), or as factors in a tensor (llama3).

The converter of Llama 3.1 and later writes no parameters but their result, `rope_freqs.weight`: one
divisor for each of the head_dim / 2 frequencies. The parameters are found again here and accepted
only if they give exactly these divisors.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from services.core.errors import ModelFileError
from services.model.config import RopeScaling
from services.model.gguf_header import GgufHeader

_FACTORS_TENSOR = "rope_freqs.weight"


def rope_scaling(header: GgufHeader, scoped: Mapping[str, Any], head_dim: int, theta: float) -> RopeScaling:
    """`scoped` is the architecture's metadata without its prefix. Raises ModelFileError for other kinds."""
    if _FACTORS_TENSOR in header.tensors:
        return _llama3_scaling(header, scoped, head_dim, theta)
    kind = scoped.get("rope.scaling.type", "none")
    factor = float(scoped.get("rope.scaling.factor", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    raise ModelFileError(
        f"{header.path} has RoPE scaling {kind!r} (supported: none, linear, llama3). Choose another model."
    )


def llama3_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> npt.NDArray[np.float64]:
    """What Llama 3.1 divides each RoPE frequency by: 1 for short wavelengths, `factor` for long ones,
    smooth between. Shape [head_dim / 2]. Source: Meta's `apply_scaling` in llama-models, llama3/model.py.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # tokens
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / scaling.factor + smooth)
    return divisors


def _llama3_scaling(
    header: GgufHeader, scoped: Mapping[str, Any], head_dim: int, theta: float
) -> RopeScaling:
    stated = _read_divisors(header, head_dim)
    # The longest wavelength is divided by `factor` itself; every published model has low and high
    # factors 1 and 4.
    scaling = RopeScaling(
        kind="llama3",
        factor=float(stated[-1]),
        original_context=int(scoped.get("rope.scaling.original_context_length", 8192)),
    )
    if not np.allclose(llama3_divisors(scaling, head_dim, theta), stated, rtol=1e-4):
        raise ModelFileError(
            f"{header.path} has RoPE factors in {_FACTORS_TENSOR} that are not those of Llama 3, "
            "which are the only ones supported. Choose another model."
        )
    return RopeScaling() if scaling.factor == 1.0 else scaling


def _read_divisors(header: GgufHeader, head_dim: int) -> npt.NDArray[np.float32]:
    tensor = header.tensors[_FACTORS_TENSOR]
    if tensor.type != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise ModelFileError(
            f"{header.path}: {_FACTORS_TENSOR} must hold {head_dim // 2} float32 values, one per "
            f"frequency, but it is {tensor.type.name} {list(tensor.shape)}. Convert the model again."
        )
    return np.fromfile(header.path, dtype="<f4", count=head_dim // 2, offset=tensor.offset)
