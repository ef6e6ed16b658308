"""Weights of GGUF files as the kernels take them: the file's own numbers, row by row."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from services.engine.device.gguf_groups import read_groups
from services.engine.device.kernel_decoder import GROUP_PACKING
from services.engine.device.weights import load_weights
from services.model.files import open_model
from tests.unit.engine.device.tiny_gguf import quantized_model

ROWS, COLUMNS = 40, 512


def blocks(kind: Type) -> np.ndarray:
    """A random weight of a type."""
    generator = np.random.default_rng(0)
    if kind is not Type.Q4_K:  # which the library reads but does not write
        weight = generator.standard_normal((ROWS, COLUMNS), np.float32)
        return quantize(weight, kind).reshape(-1, GGML_QUANT_SIZES[kind][1])
    count, size = ROWS * COLUMNS // gguf.QK_K, GGML_QUANT_SIZES[kind][1]
    scales = generator.uniform(0.001, 0.1, (count, 2)).astype(np.float16)
    rest = generator.integers(0, 256, (count, size - scales.itemsize * 2), np.uint8)
    return np.concatenate((scales.view(np.uint8), rest), axis=1)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_groups_have_the_numbers_of_the_file(kind: Type) -> None:
    data = blocks(kind)
    groups = read_groups(kind, data, ROWS)
    assert groups is not None
    assert groups.bits == (8 if kind is Type.Q8_0 else 4)
    assert np.array_equal(groups.dequantized().numpy(), dequantize(data, kind).reshape(ROWS, COLUMNS))


def test_scales_and_minimums_of_q4_k_are_rounded_to_float16() -> None:
    data = blocks(Type.Q4_K)
    groups = read_groups(Type.Q4_K, data, ROWS)
    assert groups is not None
    assert groups.minimums is not None
    exact = dequantize(data, Type.Q4_K).reshape(ROWS, -1, 32)
    error = np.abs(groups.dequantized().numpy().reshape(exact.shape) - exact)
    largest = 15 * groups.scales.abs().float() + groups.minimums.abs().float()
    assert (error <= largest.unsqueeze(-1).numpy() * 2.0**-11 + 1e-7).all()


def test_a_fused_tensor_keeps_its_bits_if_all_parts_have_as_many(tmp_path: Path) -> None:
    weights = load_weights(
        open_model(quantized_model(tmp_path)), torch.float32, torch.device("cpu"), GROUP_PACKING
    )
    layer = weights.layers[1]
    bits = [each.bits for each in (layer.qkv, layer.attention_output, layer.gate_up, layer.down)]
    assert bits == [8, 8, 4, 8]  # q and k have 4, v has 8
    assert (weights.embedding.bits, weights.unembedding.bits) == (4, 8)


@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q5_1, Type.Q6_K])
def test_other_types_have_no_groups(kind: Type) -> None:
    assert read_groups(kind, np.zeros((ROWS, GGML_QUANT_SIZES[kind][1]), np.uint8), ROWS) is None
