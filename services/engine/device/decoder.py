"""The Llama-shaped decoder, written out once; its variations are ModelConfig's fields.

    h = embedding[token]
    for each layer:  h += attention(norm(h));  h += mlp(norm(h))
    logits = unembedding(norm(h))

Source: Touvron et al., "LLaMA", 2023; the variations are those of Mistral, Qwen2, Qwen3 and Llama 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from services.engine.device.batch import Batch, build_batch
from services.engine.device.sampler import Choose, choose_with_torch
from services.engine.device.weights import LayerWeights, Weights
from services.engine.runner import Row
from services.model.config import ModelConfig


class Decoder:
    choose: Choose = staticmethod(choose_with_torch)

    def __init__(self, config: ModelConfig, weights: Weights[Tensor, Tensor], pool: Tensor) -> None:
        """pool: contiguous, finite [blocks, layers, 2, kv_heads, block_size, head_dim] on the same device."""
        self._config = config
        self._weights = weights
        self._pool = pool
        self._frequencies = rope_frequencies(config).to(pool.device)
        self._scored: dict[int, Tensor] = {}  # of the last rows those with targets: [tokens, hidden]

    def compute(self, rows: Sequence[Row]) -> tuple[list[int], Tensor]:
        """Writes the rows' KV; the indices of the rows that are sampled and their float32 [.., vocab]."""
        batch = build_batch(rows, self._pool, self._config.sliding_window)
        hidden = self._hidden(batch)
        self._scored = {
            row: hidden[first : first + len(rows[row].tokens)] for row, first in batch.scored.items()
        }
        return batch.sampled, self._logits(hidden[batch.last_tokens])

    def logits_at(self, row: int, places: range) -> Tensor:
        """Of the last computed rows, one with targets: float32 [places, vocab] after these of its tokens."""
        return self._logits(self._scored[row][places.start : places.stop])

    def _logits(self, hidden: Tensor) -> Tensor:
        normal = ops.rms_norm(hidden, self._weights.final_norm, self._config.rms_norm_eps)
        return ops.linear(normal, self._weights.unembedding).float()

    def _hidden(self, batch: Batch) -> Tensor:
        """After the last layer: [tokens, hidden]."""
        hidden = F.embedding(batch.tokens, self._weights.embedding)
        angles = ops.rope_angles(batch.positions, self._frequencies, hidden.dtype)
        for index, layer in enumerate(self._weights.layers):
            hidden = self._layer(index, layer, hidden, angles, batch)
        return hidden

    def _layer(
        self,
        index: int,
        layer: LayerWeights[Tensor],
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: Batch,
    ) -> Tensor:
        q, k, v = self._projected(layer, hidden, angles)
        return self._finished(layer, hidden, self._attend(index, q, k, v, batch))

    def _projected(
        self, layer: LayerWeights[Tensor], hidden: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes: q, k and v, [tokens, heads of each, head_dim]."""
        c = self._config
        normal = ops.rms_norm(hidden, layer.attention_norm, c.rms_norm_eps)
        qkv = self._linear(normal, layer.qkv, layer.qkv_bias).view(len(hidden), -1, c.head_dim)
        qk, v = torch.split(qkv, [c.heads + c.kv_heads, c.kv_heads], dim=1)
        if layer.qk_norm is not None:
            qk = ops.rms_norm(qk, layer.qk_norm, c.rms_norm_eps)
        q, k = torch.split(ops.apply_rope(qk, *angles), [c.heads, c.kv_heads], dim=1)
        return q, k, v

    def _finished(self, layer: LayerWeights[Tensor], hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self._linear(attended, layer.attention_output)
        normal = ops.rms_norm(hidden, layer.mlp_norm, self._config.rms_norm_eps)
        return hidden + self._linear(ops.swiglu(self._linear(normal, layer.gate_up)), layer.down)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear(x, weight, bias)

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Writes k and v; [tokens, heads * head_dim]."""
        ops.kv_write(self._pool, index, k, v, batch.blocks, batch.offsets)
        return ops.paged_attention(q, self._pool, index, batch.attention)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position after scaling, float32 [head_dim / 2]."""
    frequencies = ops.rope_frequencies(config.head_dim, config.rope_theta)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return ops.scale_linear(frequencies, scaling.factor)
    if scaling.kind == "llama3":
        return ops.scale_llama3(
            frequencies,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_context,
        )
    return frequencies
