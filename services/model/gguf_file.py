"""A model in one GGUF file: metadata -> ModelConfig, and its name, tokenizer and revision."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from services.core.errors import ModelFileError
from services.model.config import ModelConfig
from services.model.gguf_header import GgufHeader, read_header
from services.model.gguf_rope import rope_scaling
from services.model.gguf_tokenizer import gguf_tokenizer
from services.model.home import diptych_home
from services.model.revision import weights_revision
from services.model.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_QUANTIZATION_SUFFIX = re.compile(r"[.-](i?q\d\w*|bf16|f16|f32|fp16|fp32)$", re.IGNORECASE)


@dataclass(frozen=True)
class GgufFile:
    """A ModelFiles over one GGUF file, whose header was read once when it was opened."""

    path: Path
    config: ModelConfig
    header: GgufHeader = field(repr=False)
    kind: Literal["gguf", "folder"] = "gguf"

    @cached_property
    def name(self) -> str:
        """The file's stem without its quantisation: "SmolLM2-135M-Instruct.Q4_1" without ".Q4_1"."""
        return _QUANTIZATION_SUFFIX.sub("", self.path.stem)

    @property
    def weight_files(self) -> list[Path]:
        return [self.path]

    def tokenizer(self) -> Tokenizer:
        return gguf_tokenizer(self.header)

    def revision(self) -> str:
        return weights_revision([self.path], diptych_home() / "revisions.json")


def open_gguf(path: Path) -> GgufFile:
    """Raises ModelFileError if the file is not whole or holds a model that is not supported."""
    header = read_header(path)
    return GgufFile(path, gguf_config(header), header)


class _Hyperparameters(
    msgspec.Struct,
    frozen=True,
    rename={
        "layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "key_length": "attention.key_length",
        "value_length": "attention.value_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "sliding_window": "attention.sliding_window",
        "rope_dimensions": "rope.dimension_count",
        "rope_theta": "rope.freq_base",
        "experts": "expert_count",
    },
):
    """The metadata under the architecture's prefix that determines a model's shape."""

    layers: int
    context_length: int
    hidden_size: int
    intermediate_size: int
    heads: int
    rms_norm_eps: float
    kv_heads: int | None = None
    key_length: int | None = None
    value_length: int | None = None
    sliding_window: int | None = None
    rope_dimensions: int | None = None
    rope_theta: float = 10000.0
    experts: int = 0

    @property
    def head_dim(self) -> int:
        return self.key_length or self.hidden_size // self.heads


def gguf_config(header: GgufHeader) -> ModelConfig:
    """Raises ModelFileError, naming the file and the feature, for a model we cannot compute exactly."""
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise _unsupported(header, f"architecture {architecture!r} (supported: {', '.join(ARCHITECTURES)})")
    prefix = f"{architecture}."
    scoped = {
        key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)
    }
    hyper = _hyperparameters(header, scoped)
    _refuse_variants(header, hyper)
    tensors = header.tensors
    return ModelConfig(
        vocab_size=_vocab_size(header),
        hidden_size=hyper.hidden_size,
        intermediate_size=hyper.intermediate_size,
        layers=hyper.layers,
        heads=hyper.heads,
        kv_heads=hyper.kv_heads or hyper.heads,
        head_dim=hyper.head_dim,
        rms_norm_eps=hyper.rms_norm_eps,
        rope_theta=hyper.rope_theta,
        context_tokens_max=hyper.context_length,
        rope_scaling=rope_scaling(header, scoped, hyper.head_dim, hyper.rope_theta),
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        sliding_window=_sliding_window(header, hyper),
    )


def _unsupported(header: GgufHeader, feature: str) -> ModelFileError:
    return ModelFileError(f"{header.path} has {feature}, which is not supported. Choose another model.")


def _hyperparameters(header: GgufHeader, scoped: dict[str, Any]) -> _Hyperparameters:
    try:
        hyper = msgspec.convert(scoped, _Hyperparameters)
    except msgspec.ValidationError as error:
        raise ModelFileError(
            f"{header.path}: its metadata does not describe a model ({error}). "
            "Convert the model again with a current converter, or choose another one."
        ) from error
    if min(hyper.layers, hyper.heads, hyper.hidden_size) < 1:
        raise ModelFileError(f"{header.path} states a model without layers or heads. Choose another file.")
    return hyper


def _vocab_size(header: GgufHeader) -> int:
    # The embedding's rows, not the vocabulary's length: some models pad the one beyond the other.
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(
            f"{header.path} has no tensor token_embd.weight. Delete it and download it again."
        )
    return embedding.shape[1]


def _refuse_variants(header: GgufHeader, hyper: _Hyperparameters) -> None:
    if hyper.experts:
        raise _unsupported(header, f"a mixture of {hyper.experts} experts")
    if header.metadata.get("split.count", 1) > 1:
        raise ModelFileError(
            f"{header.path} is one of {header.metadata['split.count']} parts. "
            "Join them first with `llama-gguf-split --merge`."
        )
    if hyper.value_length not in (None, hyper.head_dim):
        raise _unsupported(header, f"keys of {hyper.head_dim} and values of {hyper.value_length} dimensions")
    if hyper.rope_dimensions not in (None, hyper.head_dim):
        raise _unsupported(header, f"RoPE on {hyper.rope_dimensions} of {hyper.head_dim} dimensions")
    for name in ("attn_output.bias", "ffn_up.bias", "ffn_gate.bias", "ffn_down.bias"):
        if f"blk.0.{name}" in header.tensors:
            raise _unsupported(header, f"the bias {name}")


def _sliding_window(header: GgufHeader, hyper: _Hyperparameters) -> int | None:
    window = hyper.sliding_window
    if not window or window >= hyper.context_length:
        return None
    # Mistral, which GGUF calls llama, slides on every layer. In other architectures some layers may
    # not, and the file does not say which.
    if header.metadata["general.architecture"] != "llama":
        raise _unsupported(header, f"a sliding window of {window} tokens on unstated layers")
    return window
