"""The C++ attention over the paged pool, and the small kernels around it."""

import pytest
import torch

from kernels.cpu.int8 import Int8Kernels
from kernels.ops import AttentionRow, rms_norm, swiglu
from tests.kernels.test_paged_attention import LAYER, Scene, plain_attention

# heads, kv_heads, dim, block_size
SHAPES = [(4, 4, 8, 16), (6, 2, 10, 4), (9, 3, 64, 16), (9, 3, 64, 8), (8, 2, 96, 32), (40, 1, 16, 5)]


@pytest.mark.parametrize("window", [None, 1, 5, 40, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
def test_a_mixed_batch_equals_plain_attention(
    every_kernels: Int8Kernels, heads: int, kv_heads: int, dim: int, block_size: int, window: int | None
) -> None:
    contexts, queries = [1, 16, 64, 65, 129, 13, 70], [1, 1, 1, 1, 1, 13, 21]
    scene = Scene(contexts, kv_heads, dim, block_size)
    rows = [scene.row(sequence, count) for sequence, count in enumerate(queries)]
    q = torch.randn(sum(queries), heads, dim)
    out = every_kernels.paged_attention(q, scene.pool, LAYER, rows, window)
    first = 0
    for sequence, row in enumerate(rows):
        part = slice(first, first + row.queries)
        exact = plain_attention(q[part], scene.keys[sequence], scene.values[sequence], row.start, window)
        assert torch.allclose(out[part].double(), exact, atol=1e-5)
        first += row.queries


def test_a_long_context_equals_plain_attention(kernels: Int8Kernels) -> None:
    scene = Scene([3000], 1, 64, 16)
    q = torch.randn(2, 2, 64) * 3
    out = kernels.paged_attention(q, scene.pool, LAYER, [scene.row(0, 2)], None)
    exact = plain_attention(q, scene.keys[0], scene.values[0], 2998, None)
    assert torch.allclose(out.double(), exact, atol=1e-5)


@pytest.mark.parametrize("window", [None, 24, 90])
def test_queries_are_bitwise_the_same_in_any_batch_chunk_and_number_of_threads(
    kernels: Int8Kernels, two_threads: Int8Kernels, window: int | None
) -> None:
    contexts = [5, 100, 64, 128, 129, 260, 31]
    scene = Scene(contexts, 3, 64, 16)
    q = [torch.randn(context, 9, 64) for context in contexts]
    rows = [scene.row(sequence, context) for sequence, context in enumerate(contexts)]
    whole = [
        kernels.paged_attention(mine, scene.pool, LAYER, [row], window)
        for mine, row in zip(q, rows, strict=True)
    ]
    together = two_threads.paged_attention(torch.cat(q), scene.pool, LAYER, rows, window)
    assert torch.equal(together, torch.cat(whole))
    for size in (1, 7, 64, 65):
        parts = [
            AttentionRow(min(size, 260 - start), start, scene.tables[5]) for start in range(0, 260, size)
        ]
        assert torch.equal(kernels.paged_attention(q[5], scene.pool, LAYER, parts, window), whole[5])


def test_the_block_size_changes_no_bit(kernels: Int8Kernels) -> None:
    outputs = []
    for block_size in (1, 8, 16, 48):
        torch.manual_seed(5)
        scene = Scene([200], 2, 16, block_size)
        outputs.append(
            kernels.paged_attention(torch.randn(3, 4, 16), scene.pool, LAYER, [scene.row(0, 3)], None)
        )
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_what_stale_blocks_hold_beyond_the_context_has_no_effect(kernels: Int8Kernels) -> None:
    outputs = []
    for fill in (0.0, 1e30):
        torch.manual_seed(1)
        scene = Scene([37, 5], 2, 8, 16, fill=fill)
        rows = [scene.row(0, 1), scene.row(1, 1)]
        outputs.append(kernels.paged_attention(torch.randn(2, 4, 8), scene.pool, LAYER, rows, None))
    assert torch.equal(*outputs)


def test_norm_and_gate_equal_the_reference(every_kernels: Int8Kernels) -> None:
    x, weight = torch.randn(7, 100) * 30, torch.randn(100)
    assert torch.allclose(every_kernels.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), rtol=1e-5)
    gate, up = torch.randn(500, 16) * 20, torch.randn(500, 16)
    gate[0] = torch.tensor([-200.0, -90, -87, -50, 0, 50, 87, 90, 200, 1e4, -1e4, 1e-6, -1e-6, 1, -1, 3e38])
    exact = swiglu(torch.cat((gate, up), dim=1))
    assert torch.allclose(every_kernels.swiglu(gate, up), exact, rtol=1e-5, atol=1e-30)
