"""kv_write, plan_attention and paged_attention together, against attention written plainly."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.ops import AttentionRow, kv_write, padded_blocks, paged_attention, plan_attention

LAYERS, LAYER = 3, 1


class Scene:
    """Sequences with random keys and values, written into a pool at shuffled blocks."""

    def __init__(
        self, contexts: list[int], kv_heads: int, dim: int, block_size: int, fill: float = 0.0
    ) -> None:
        self.block_size = block_size
        counts = [-(-context // block_size) for context in contexts]
        shuffled = random.Random(7).sample(range(sum(counts) + 3), sum(counts))
        self.tables = [[shuffled.pop() for _ in range(count)] for count in counts]
        self.keys = [torch.randn(context, kv_heads, dim) for context in contexts]
        self.values = [torch.randn(context, kv_heads, dim) for context in contexts]
        self.pool = torch.full((sum(counts) + 3, LAYERS, 2, kv_heads, block_size, dim), fill)
        for table, k, v in zip(self.tables, self.keys, self.values, strict=True):
            positions = torch.arange(len(k))
            blocks = torch.tensor(table)[positions // block_size]
            kv_write(self.pool, LAYER, k, v, blocks, positions % block_size)

    def row(self, sequence: int, queries: int) -> AttentionRow:
        """The last `queries` tokens of a sequence."""
        return AttentionRow(queries, len(self.keys[sequence]) - queries, self.tables[sequence])

    def attend(self, rows: list[AttentionRow], q: Tensor, window: int | None, at_once: int = 4096) -> Tensor:
        return paged_attention(q, self.pool, LAYER, plan_attention(rows, self.pool, window, at_once))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    """One sequence, token by token and head by head, in float64."""
    queries, heads, dim = q.shape
    out = torch.empty(queries, heads, dim, dtype=torch.float64)
    for index in range(queries):
        end = start + index + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(heads):
            group = head * k.shape[1] // heads
            scores = k[begin:end, group].double() @ q[index, head].double() / math.sqrt(dim)
            out[index, head] = scores.softmax(0) @ v[begin:end, group].double()
    return out.reshape(queries, heads * dim)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(4, 4, 8, 16), (6, 2, 10, 4), (9, 3, 64, 16)]
)
def test_a_mixed_batch_equals_plain_attention(
    heads: int, kv_heads: int, dim: int, block_size: int, window: int | None
) -> None:
    contexts, queries = [1, 16, 17, 33, 90, 90, 13, 64], [1, 1, 1, 1, 1, 1, 13, 21]
    scene = Scene(contexts, kv_heads, dim, block_size)
    rows = [scene.row(sequence, count) for sequence, count in enumerate(queries)]
    q = torch.randn(sum(queries), heads, dim)
    out = scene.attend(rows, q, window, at_once=100)
    first = 0
    for sequence, row in enumerate(rows):
        part = slice(first, first + row.queries)
        expected = plain_attention(q[part], scene.keys[sequence], scene.values[sequence], row.start, window)
        assert torch.allclose(out[part].double(), expected, atol=1e-5)
        first += row.queries


@pytest.mark.parametrize("window", [None, 24])
def test_a_row_is_bitwise_the_same_alone_and_in_any_batch(window: int | None) -> None:
    contexts = [5, 100, 101, 250, 260, 300, 300, 7]
    scene = Scene(contexts, 3, 64, 16)
    q = torch.randn(len(contexts), 9, 64)
    rows = [scene.row(sequence, 1) for sequence in range(len(contexts))]
    alone = torch.cat([scene.attend([row], q[i : i + 1], window) for i, row in enumerate(rows)])
    order = sorted(range(len(rows)), key=lambda i: padded_blocks(rows[i], 16, window))
    together = scene.attend([rows[i] for i in order], q[order], window)
    assert torch.equal(together, alone[order])


def test_what_stale_blocks_hold_beyond_the_context_has_no_effect() -> None:
    torch.manual_seed(1)
    clean = Scene([37, 5], 2, 8, 16)
    torch.manual_seed(1)
    stale = Scene([37, 5], 2, 8, 16, fill=1e30)
    q = torch.randn(2, 4, 8)
    outputs = [scene.attend([scene.row(0, 1), scene.row(1, 1)], q, None) for scene in (clean, stale)]
    assert torch.equal(*outputs)


def test_a_sequence_that_overflows_does_not_spoil_the_next_user_of_its_block() -> None:
    scene = Scene([3], 1, 4, 16)
    block = torch.tensor([scene.tables[0][0]])
    broken = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]]])
    kv_write(scene.pool, LAYER, broken, broken, block, torch.tensor([9]))
    assert scene.pool.isfinite().all()
    q = torch.randn(1, 1, 4)
    expected = plain_attention(q, scene.keys[0], scene.values[0], 2, None)
    assert torch.allclose(scene.attend([scene.row(0, 1)], q, None).double(), expected, atol=1e-5)


def test_kv_write_touches_only_its_layer_and_slots() -> None:
    pool = torch.zeros(4, LAYERS, 2, 2, 8, 5)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    kv_write(pool, 2, k, v, torch.tensor([3, 0, 3]), torch.tensor([7, 1, 0]))
    expected = torch.zeros_like(pool)
    for token, (block, offset) in enumerate(((3, 7), (0, 1), (3, 0))):
        expected[block, 2, 0, :, offset] = k[token]
        expected[block, 2, 1, :, offset] = v[token]
    assert torch.equal(pool, expected)


def test_padding_wastes_at_most_a_quarter_and_never_shrinks_with_the_context() -> None:
    row = AttentionRow(1, 0, range(10_000))
    padded = [padded_blocks(replace(row, start=blocks * 16 - 1), 16, None) for blocks in range(1, 5000)]
    for blocks, size in enumerate(padded, start=1):
        assert blocks <= size <= blocks * 1.25
    assert padded == sorted(padded)


def test_a_sliding_window_reads_only_the_blocks_in_sight() -> None:
    far = AttentionRow(1, 9_999, list(range(625)))
    assert padded_blocks(far, 16, 32) == 2
    assert padded_blocks(far, 16, 33) == 3
    pool = torch.zeros(625, 1, 2, 1, 16, 4)
    (group,) = plan_attention([far], pool, 32, 4096)
    assert group.slices.tolist() == [2 * 623, 2 * 624, 2 * 623 + 1, 2 * 624 + 1]


def test_groups_gather_no_more_context_than_allowed() -> None:
    pool = torch.zeros(64, 1, 2, 1, 16, 4)
    rows = [AttentionRow(1, 99, list(range(7))) for _ in range(9)]  # 7 blocks: 112 tokens
    groups = plan_attention(rows, pool, None, 250)
    assert [group.rows for group in groups] == [2, 2, 2, 2, 1]
    assert [group.first for group in groups] == [0, 2, 4, 6, 8]
    assert [group.rows for group in plan_attention(rows, pool, None, 1)] == [1] * 9
