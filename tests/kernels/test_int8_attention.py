"""The C++ attention over the paged pool, and the small kernels around it."""

import math

import pytest
import torch
from torch import Tensor

from kernels.cpu.kernels import CpuKernels, kv_token_bytes
from kernels.ops import AttentionRow, rms_norm, swiglu
from tests.kernels.test_paged_attention import LAYER, LAYERS, Scene, plain_attention

# heads, kv_heads, dim, block_size
SHAPES = [(4, 4, 8, 16), (6, 2, 10, 4), (9, 3, 64, 16), (9, 3, 64, 8), (8, 2, 96, 32), (40, 1, 16, 5)]


class FloatScene(Scene):
    """Keys and values of float32, as the torch path has them; `seen` is what attention computes with."""

    def __init__(self, kernels: CpuKernels, *shape: int, contexts: list[int], fill: float = 0.0) -> None:
        super().__init__(contexts, *shape, fill=fill)
        self.seen = list(zip(self.keys, self.values, strict=True))

    def seen_queries(self, q: Tensor) -> Tensor:
        return q


class Int8Scene(FloatScene):
    """The same keys and values in 8 bits."""

    def __init__(self, kernels: CpuKernels, *shape: int, contexts: list[int], fill: float = 0.0) -> None:
        super().__init__(kernels, *shape, contexts=contexts)
        kv_heads, dim, block_size = shape
        shape = (len(self.pool), LAYERS, 2, kv_heads, block_size, kv_token_bytes(dim))
        self.pool = torch.zeros(shape, dtype=torch.int8)
        k_codes, v_codes, scales = self._row_parts(self.pool)
        k_codes.fill_(fill and 127), v_codes.fill_(fill and 127), scales.fill_(fill)
        for table, k, v in zip(self.tables, self.keys, self.values, strict=True):
            blocks = [table[position // block_size] for position in range(len(k))]
            offsets = [position % block_size for position in range(len(k))]
            kernels.kv_write(self.pool, LAYER, k, v, blocks, offsets)
        self.seen = [self.read(sequence) for sequence in range(len(contexts))]

    def seen_queries(self, q: Tensor) -> Tensor:
        spread = spreading(q.shape[2])
        return rounded_to_8_bits(q @ spread) @ spread / spread_size(spread)

    @property
    def scales(self) -> Tensor:
        return self._row_parts(self.pool)[2]

    def read(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Its keys and values, [tokens, kv_heads, dim] each."""
        k, v, scales = (part[self.tables[sequence], LAYER] for part in self._row_parts(self.pool))
        tokens, _, dim = self.keys[sequence].shape
        k = k.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(2).float()
        v = v.permute(0, 2, 1, 3).flatten(0, 1).float()
        k_scales, v_scales = scales.permute(1, 0, 3, 2).flatten(1, 2).unsqueeze(-1)
        spread = spreading(dim)
        keys = (k[..., :dim] * k_scales) @ spread / spread_size(spread)
        return keys[:tokens], (v[..., :dim] * v_scales)[:tokens]

    def _row_parts(self, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the pool as its rows are laid out: k [blocks, layers, kv_heads, fours, block_size, 4],
        v [blocks, layers, kv_heads, block_size, width], scales [blocks, layers, 2, kv_heads, block_size]."""
        block_size, width = self.block_size, pool.shape[5] - 4
        codes, scales = pool.flatten(4).split([block_size * width, block_size * 4], dim=-1)
        k, v = codes[:, :, 0], codes[:, :, 1]
        return (
            k.unflatten(-1, (width // 4, block_size, 4)),
            v.unflatten(-1, (block_size, width)),
            scales.view(torch.float32),
        )


def spreading(dim: int) -> Tensor:
    """The symmetric matrix [dim, dim] of 1, -1 and 0 that spreads a head before it is rounded."""
    matrix = torch.ones(1, 1)
    while dim % (2 * len(matrix)) == 0:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return torch.block_diag(*[matrix] * (dim // len(matrix)))


def spread_size(spread: Tensor) -> int:
    """How many numbers it mixes: its square is that many times the unit matrix."""
    return len(spread[0].nonzero())


def rounded_to_8_bits(x: Tensor) -> Tensor:
    top = x.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(127.0) / top  # 127 / top would round twice: it is top.reciprocal() * 127
    return (x * inverse).round() * (top / 127)


def random_queries(*shape: int) -> Tensor:
    """Multiples of 1/8, whose sums are exact in any order: rounding depends on no library."""
    return torch.randn(shape).mul(8).round() / 8


SCENES = [FloatScene, Int8Scene]


@pytest.mark.parametrize("window", [None, 1, 5, 40, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
@pytest.mark.parametrize("scene_of", SCENES)
def test_a_mixed_batch_equals_plain_attention(
    every_kernels: CpuKernels,
    scene_of: type[FloatScene],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    window: int | None,
) -> None:
    contexts, queries = [1, 16, 64, 65, 129, 13, 70], [1, 1, 1, 1, 1, 13, 21]
    scene = scene_of(every_kernels, kv_heads, dim, block_size, contexts=contexts)
    rows = [scene.row(sequence, count) for sequence, count in enumerate(queries)]
    q = random_queries(sum(queries), heads, dim)
    out = every_kernels.paged_attention(q, scene.pool, LAYER, rows, window)
    first = 0
    for sequence, row in enumerate(rows):
        part = slice(first, first + row.queries)
        exact = plain_attention(scene.seen_queries(q[part]), *scene.seen[sequence], row.start, window)
        assert torch.allclose(out[part].double(), exact, atol=1e-5)
        first += row.queries


@pytest.mark.parametrize("scene_of", SCENES)
def test_a_long_context_equals_plain_attention(kernels: CpuKernels, scene_of: type[FloatScene]) -> None:
    scene = scene_of(kernels, 1, 64, 16, contexts=[3000])
    q = random_queries(2, 2, 64) * 3
    out = kernels.paged_attention(q, scene.pool, LAYER, [scene.row(0, 2)], None)
    exact = plain_attention(scene.seen_queries(q), *scene.seen[0], 2998, None)
    assert torch.allclose(out.double(), exact, atol=1e-5)


@pytest.mark.parametrize("scene_of", SCENES)
@pytest.mark.parametrize("window", [None, 24, 90])
def test_queries_are_bitwise_the_same_in_any_batch_chunk_and_number_of_threads(
    kernels: CpuKernels, two_threads: CpuKernels, window: int | None, scene_of: type[FloatScene]
) -> None:
    contexts = [5, 100, 64, 128, 129, 260, 31]
    scene = scene_of(kernels, 3, 64, 16, contexts=contexts)
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


@pytest.mark.parametrize("scene_of", SCENES)
def test_the_block_size_changes_no_bit(kernels: CpuKernels, scene_of: type[FloatScene]) -> None:
    outputs = []
    for block_size in (1, 8, 16, 48):
        torch.manual_seed(5)
        scene = scene_of(kernels, 2, 16, block_size, contexts=[200])
        outputs.append(
            kernels.paged_attention(torch.randn(3, 4, 16), scene.pool, LAYER, [scene.row(0, 3)], None)
        )
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("scene_of", SCENES)
def test_what_stale_blocks_hold_beyond_the_context_has_no_effect(
    kernels: CpuKernels, scene_of: type[FloatScene]
) -> None:
    outputs = []
    for fill in (0.0, 1e30):
        torch.manual_seed(1)
        scene = scene_of(kernels, 2, 8, 16, contexts=[37, 5], fill=fill)
        rows = [scene.row(0, 1), scene.row(1, 1)]
        outputs.append(kernels.paged_attention(torch.randn(2, 4, 8), scene.pool, LAYER, rows, None))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dim", [6, 8, 64, 96])
def test_8_bits_are_near_what_is_written_even_with_one_large_dimension(
    every_kernels: CpuKernels, dim: int
) -> None:
    scene = Int8Scene(every_kernels, 2, dim, 16, contexts=[40])
    for seen, written in zip(scene.seen[0], (scene.keys[0], scene.values[0]), strict=True):
        assert (seen - written).norm(dim=-1).max() <= written.norm(dim=-1).max() * 0.01
    scene.keys[0][..., 3] *= 100
    blocks = [scene.tables[0][position // 16] for position in range(40)]
    every_kernels.kv_write(
        scene.pool, LAYER, scene.keys[0], scene.values[0], blocks, [position % 16 for position in range(40)]
    )
    error = (scene.read(0)[0] - scene.keys[0])[..., :3].square().mean().sqrt()
    largest = scene.keys[0].abs().max()
    # A step would be the largest number / 127 without spreading, and its error a third of it.
    assert error <= largest / 127 / 3 / math.sqrt(spread_size(spreading(dim))) * 1.5


def test_8_bits_of_what_is_not_finite_are_finite(every_kernels: CpuKernels) -> None:
    scene = Int8Scene(every_kernels, 1, 8, 16, contexts=[5])
    broken = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0, 3e38, 3e38, 3e38, 3e38]]])
    for part in (broken, broken * 0 + 3e38, broken * math.nan, broken * 0 + 1e-40):
        every_kernels.kv_write(scene.pool, LAYER, part, part, [scene.tables[0][0]], [7])
        assert scene.scales.isfinite().all()
        out = every_kernels.paged_attention(
            part, scene.pool, LAYER, [AttentionRow(1, 7, scene.tables[0])], None
        )
        assert out.isfinite().all()


def test_norm_and_gate_equal_the_reference(every_kernels: CpuKernels) -> None:
    x, weight = torch.randn(7, 100) * 30, torch.randn(100)
    assert torch.allclose(every_kernels.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), rtol=1e-5)
    gate, up = torch.randn(500, 16) * 20, torch.randn(500, 16)
    gate[0] = torch.tensor([-200.0, -90, -87, -50, 0, 50, 87, 90, 200, 1e4, -1e4, 1e-6, -1e-6, 1, -1, 3e38])
    exact = swiglu(torch.cat((gate, up), dim=1))
    assert torch.allclose(every_kernels.swiglu(gate, up), exact, rtol=1e-5, atol=1e-30)
