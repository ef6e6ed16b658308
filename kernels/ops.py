"""The ops that model code calls, from one place. Where a device has a better one, it is chosen here."""

from torch import Tensor

from kernels.cpu import packed_linear as cpu
from kernels.reference import linear as reference
from kernels.reference.attention_plan import AttentionGroup, AttentionRow, padded_blocks, plan_attention
from kernels.reference.kv_write import kv_write
from kernels.reference.paged_attention import paged_attention
from kernels.reference.penalties import add_bias, forbid, penalize_output, penalize_repetition
from kernels.reference.rms_norm import rms_norm
from kernels.reference.rope import apply_rope, rope_angles, rope_frequencies, scale_linear, scale_llama3
from kernels.reference.sampling import gumbel_argmax, keep_min_p, keep_top_k, keep_top_p
from kernels.reference.swiglu import swiglu
from kernels.reference.token_mask import allow

__all__ = [
    "AttentionGroup",
    "AttentionRow",
    "add_bias",
    "allow",
    "apply_rope",
    "forbid",
    "gumbel_argmax",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "kv_write",
    "linear",
    "pack_weight",
    "padded_blocks",
    "paged_attention",
    "penalize_output",
    "penalize_repetition",
    "plan_attention",
    "rms_norm",
    "rope_angles",
    "rope_frequencies",
    "scale_linear",
    "scale_llama3",
    "swiglu",
]


def pack_weight(weight: Tensor) -> Tensor:
    """A projection's weight [outputs, inputs] in the form that `linear` runs fastest with."""
    return cpu.pack(weight) if cpu.can_pack(weight) else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[tokens, inputs] -> [tokens, outputs]. `weight` comes from `pack_weight`."""
    if weight.is_mkldnn:
        return cpu.packed_linear(x, weight, bias)
    return reference.linear(x, weight, bias)
