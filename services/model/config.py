"""The architecture of a Llama-shaped decoder, free of any file format.

`services.model.hf_folder` and `services.model.gguf_file` build it; the engine's device computes it.
"""

from dataclasses import dataclass, field
from typing import Literal

from services.model.pool_geometry import PoolGeometry


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, as are the two below
    high_freq_factor: float = 4.0
    original_context: int = 8192  # tokens


@dataclass(frozen=True, slots=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int  # fewer than `heads`: grouped-query attention
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    context_tokens_max: int  # positions the model was trained for
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head of q and k, before RoPE
    sliding_window: int | None = None  # tokens a query sees, itself included

    def pool_geometry(self, blocks: int, block_size: int, dtype: str = "float32") -> PoolGeometry:
        return PoolGeometry(blocks, self.layers, self.kv_heads, block_size, self.head_dim, dtype)
