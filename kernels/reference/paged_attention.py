"""Causal grouped-query attention over a paged KV pool.

    a[t, h] = sum over s of softmax_s(q[t, h] . k[s, g] / sqrt(dim)) * v[s, g]      g = h * kv_heads / heads

where s runs over the positions of t's sequence that t sees: those up to its own, and of these the
last `window` if attention slides. `attention_plan` says which blocks hold them.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023. The blocks are gathered here and then attended with a fused torch op.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.attention_plan import AttentionGroup


def paged_attention(q: Tensor, pool: Tensor, layer: int, groups: Sequence[AttentionGroup]) -> Tensor:
    """[tokens, heads, dim] -> [tokens, heads * dim].

    pool: contiguous [blocks, layers, 2, kv_heads, block_size, dim], finite everywhere, with the batch's
    own tokens already written. groups: the batch's plan.
    """
    outputs = [_attend(q, pool, layer, group) for group in groups]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(q: Tensor, pool: Tensor, layer: int, group: AttentionGroup) -> Tensor:
    heads, dim = q.shape[1:]
    k, v = _gather(pool, layer, group)
    tokens = group.rows * group.queries
    q = q[group.first : group.first + tokens]
    if group.queries == 1:
        # The query heads that share a kv head become its queries: k and v are read once for all of them.
        q = q.view(group.rows, k.shape[1], -1, dim)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.bias).reshape(tokens, heads * dim)
    q = q.view(group.rows, group.queries, heads, dim).transpose(1, 2)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=group.bias, enable_gqa=True)
    return attended.transpose(1, 2).reshape(tokens, heads * dim)


def _gather(pool: Tensor, layer: int, group: AttentionGroup) -> tuple[Tensor, Tensor]:
    """k and v of the group's blocks, each [rows, kv_heads, context, dim]."""
    kv_heads, block_size, dim = pool.shape[3:]
    slices = pool.view(-1, block_size * dim)
    torch.index_select(slices, 0, group.slices + layer * 2 * kv_heads, out=group.gathered)
    k, v = group.gathered.view(2, group.rows, kv_heads, -1, dim).unbind(0)
    return k, v
