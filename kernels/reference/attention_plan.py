"""What paged attention must know of a batch, computed once per step and used by every layer.

Rows of one query token (decode) whose contexts fill about as many blocks form a group, padded to the
same number of blocks. A row of several query tokens (a prefill chunk) is a group of its own.

How far a row is padded depends on the row alone, never on its neighbours: the sums over its context
are then taken in the same order in every batch, and so are its tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One sequence's query tokens: positions [start, start + queries) over its block table."""

    queries: int
    start: int
    block_table: Sequence[int]


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    first: int  # index of the group's first query token in the batch
    rows: int
    queries: int  # per row
    slices: Tensor  # int64 [2 * rows * kv_heads * blocks]: layer 0's k, then v, in units of block_size * dim
    bias: Tensor  # [rows, 1, queries, context]: 0 where a query sees a key, else -inf
    gathered: Tensor  # scratch for the slices: [2 * rows * kv_heads * blocks, block_size * dim]


def padded_blocks(row: AttentionRow, block_size: int, window: int | None) -> int:
    """Blocks that the row's attention reads, rounded up to one of four sizes per power of two.

    The waste is at most a quarter. Sort a batch by (queries, this) to get the fewest groups.
    """
    first, end = _visible_blocks(row, block_size, window)
    if row.queries > 1:
        return end - first
    step = 1 << max(0, (end - first - 1).bit_length() - 3)
    return -(-(end - first) // step) * step


def _visible_blocks(row: AttentionRow, block_size: int, window: int | None) -> tuple[int, int]:
    oldest = 0 if window is None else max(0, row.start + 1 - window)
    return oldest // block_size, -(-(row.start + row.queries) // block_size)


def plan_attention(
    rows: Sequence[AttentionRow], pool: Tensor, window: int | None, tokens_per_group: int
) -> list[AttentionGroup]:
    """The groups of a batch whose query tokens are those of `rows`, one row after the other.

    pool: [blocks, layers, 2, kv_heads, block_size, dim]. `window` is how many tokens a query sees,
    itself included (None: all). `tokens_per_group` bounds the context tokens gathered at once.
    """
    _, _, _, kv_heads, block_size, dim = pool.shape
    parts = list(_groups(rows, block_size, window, tokens_per_group))
    # One scratch for all groups and layers: a fresh one each time costs more in page faults than the copy.
    slices_max = max(2 * kv_heads * blocks * len(members) for blocks, members in parts)
    scratch = torch.empty((slices_max, block_size * dim), dtype=pool.dtype, device=pool.device)
    groups, first = [], 0
    for blocks, members in parts:
        groups.append(_group(members, first, blocks, pool, window, scratch))
        first += sum(row.queries for row in members)
    return groups


def _groups(
    rows: Sequence[AttentionRow], block_size: int, window: int | None, tokens_per_group: int
) -> Iterator[tuple[int, list[AttentionRow]]]:
    def key(row: AttentionRow) -> tuple[int, int]:
        return row.queries, padded_blocks(row, block_size, window)

    for (queries, blocks), alike in groupby(rows, key):
        members = list(alike)
        size = 1 if queries > 1 else max(1, tokens_per_group // (blocks * block_size))
        for at in range(0, len(members), size):
            yield blocks, members[at : at + size]


def _group(
    rows: list[AttentionRow], first: int, blocks: int, pool: Tensor, window: int | None, scratch: Tensor
) -> AttentionGroup:
    block_size = pool.shape[4]
    tables = np.empty((len(rows), blocks), dtype=np.int64)
    oldest = np.empty((len(rows), 1), dtype=np.int64)  # position of the first token in the table
    for index, row in enumerate(rows):
        begin, end = _visible_blocks(row, block_size, window)
        tables[index, : end - begin] = row.block_table[begin:end]
        tables[index, end - begin :] = row.block_table[begin]  # any block of the row: it is masked
        oldest[index] = begin * block_size
    starts = np.array([row.start for row in rows], dtype=np.int64)
    queries = rows[0].queries
    visible = _visible(starts, queries, oldest + np.arange(blocks * block_size), window)
    bias = torch.zeros(visible.shape, dtype=pool.dtype).masked_fill_(torch.from_numpy(~visible), -torch.inf)
    slices = torch.from_numpy(_slices(tables, pool)).to(pool.device)
    bias = bias.unsqueeze(1).to(pool.device)
    return AttentionGroup(first, len(rows), queries, slices, bias, scratch[: len(slices)])


def _visible(
    starts: np.ndarray, queries: int, keys: np.ndarray, window: int | None
) -> np.ndarray:  # [rows, queries, context]
    query = (starts[:, None] + np.arange(queries))[:, :, None]
    key = keys[:, None, :]
    # Padding lies behind the row's last token or repeats a block there, so causality hides it too.
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _slices(tables: np.ndarray, pool: Tensor) -> np.ndarray:
    """Where layer 0's k and v of every (row, kv head, block) start in the pool, in (block_size, dim)s."""
    _, layers, _, kv_heads, _, _ = pool.shape
    heads = np.arange(kv_heads)[None, :, None]
    keys = tables[:, None, :] * (layers * 2 * kv_heads) + heads  # [rows, kv_heads, blocks]
    return np.concatenate((keys.ravel(), keys.ravel() + kv_heads))
