"""Tiny models as GGUF files, of float32 or quantised."""

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers.models.llama import LlamaConfig

from services.engine.device.gguf_weights import gguf_name
from services.model.files import open_model
from tests.unit.engine.device.tiny_models import SIZES, randomized

# Kinds that kernels take as they are and one that they do not; where tensors are fused, a mixture.
KINDS = {
    "token_embd": Type.Q4_0,
    "output": Type.Q8_0,
    "attn_q": Type.Q4_1,
    "attn_k": Type.Q4_1,
    "attn_v": Type.Q8_0,
    "attn_output": Type.Q5_1,
    "ffn_gate": Type.Q4_1,
    "ffn_up": Type.Q4_0,
    "ffn_down": Type.Q8_0,
}


def interleaved_rows(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """As the converter to GGUF orders q and k of the llama architecture."""
    heads = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder: Path, path: Path, architecture: str, theta: float = 10000.0, kinds: dict[str, Type] | None = None
) -> Path:
    """The safetensors model in `folder` as a GGUF file, of float32 but for those with a kind."""
    config = open_model(folder).config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context_tokens_max)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(theta)
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleaved_rows(array, config.head_dim)
        stored = gguf_name(name)
        kind = (kinds or {}).get(stored.split(".")[-2], Type.F32)
        writer.add_tensor(stored, quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized_model(folder: Path) -> Path:
    """A random llama with tensors of KINDS, in a file of `folder`."""
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    randomized(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(folder)
    return write_gguf(folder, folder / "model.gguf", "llama", kinds=KINDS)
