"""Keys and values of a batch's tokens into the paged pool.

    pool[block[t], layer, 0, h, offset[t], :] = k[t, h, :]
    pool[block[t], layer, 1, h, offset[t], :] = v[t, h, :]

A value that is not finite is stored as 0. Attention reads whole blocks and gives the tokens beyond a
row's context the weight 0, and 0 * NaN is NaN: without this, one sequence whose activations overflow
would spoil every later sequence that reuses its blocks. All pool contents are therefore finite, as
long as the pool starts as zeros and received blocks come from a pool written by this function.
"""

from torch import Tensor


def kv_write(pool: Tensor, layer: int, k: Tensor, v: Tensor, blocks: Tensor, offsets: Tensor) -> None:
    """Writes in place.

    pool: [blocks, layers, 2, kv_heads, block_size, dim]; k, v: [tokens, kv_heads, dim];
    blocks, offsets: int64 [tokens], the block of each token and its place in the block.
    """
    by_token = pool[:, layer].permute(1, 0, 3, 2, 4)  # [k|v, block, offset, kv_head, dim]
    by_token[0].index_put_((blocks, offsets), k.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    by_token[1].index_put_((blocks, offsets), v.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
