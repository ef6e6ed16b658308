"""A model's weights on its device, fused so that a layer is four matrix products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kernels import ops
from services.engine.device.fused_tensor import FusedTensor
from services.engine.device.gguf_weights import GgufSource
from services.engine.device.safetensors_weights import SafetensorsSource
from services.engine.device.tensor_source import TensorSource
from services.model.config import ModelConfig
from services.model.files import ModelFiles

E = TypeVar("E")  # an embedding in the form that rows of it are looked up in
P = TypeVar("P")  # a projection in the form that its kernel takes


@dataclass(frozen=True, slots=True)
class Packing(Generic[E, P]):
    """How matrices [outputs, inputs] get their form."""

    projection: Callable[[FusedTensor], P]
    gate_up: Callable[[FusedTensor], P]  # of gate, then up
    embedding: Callable[[FusedTensor], E]
    tied: Callable[[FusedTensor], tuple[E, P]]  # one that is embedding and unembedding


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[P]):
    """The shapes of projections are those before packing."""

    attention_norm: Tensor  # [hidden]
    qkv: P  # [(heads + 2 * kv_heads) * head_dim, hidden]: q, then k, then v
    qkv_bias: Tensor | None  # [(heads + 2 * kv_heads) * head_dim]
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    attention_output: P  # [hidden, heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: P  # [2 * intermediate, hidden]: gate, then up
    down: P  # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class Weights(Generic[E, P]):
    embedding: E  # [vocab, hidden]
    layers: tuple[LayerWeights[P], ...]
    final_norm: Tensor  # [hidden]
    unembedding: P  # [vocab, hidden]


def _pack(matrix: FusedTensor) -> Tensor:
    return ops.pack_weight(matrix.floats())


def _pack_tied(matrix: FusedTensor) -> tuple[Tensor, Tensor]:
    embedding = matrix.floats()
    return embedding, ops.pack_weight(embedding)


TORCH_PACKING = Packing(_pack, _pack, FusedTensor.floats, _pack_tied)


def load_weights(
    files: ModelFiles, dtype: torch.dtype, device: torch.device, packing: Packing[E, P]
) -> Weights[E, P]:
    """Raises ModelFileError, naming the tensor and the file, for a missing, misshapen or unsupported one."""
    return _Loader(files.config, _source(files), dtype, device, packing).weights()


def _source(files: ModelFiles) -> TensorSource:
    if files.kind == "gguf":
        return GgufSource(files.weight_files[0], files.config.head_dim)
    return SafetensorsSource(files.weight_files)


class _Loader(Generic[E, P]):
    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        packing: Packing[E, P],
    ) -> None:
        self._config = config
        self._source = source
        self._dtype = dtype
        self._device = device
        self._packing = packing

    def weights(self) -> Weights[E, P]:
        c = self._config
        embedding, unembedding = self._tables()
        return Weights(
            embedding=embedding,
            layers=tuple(self._layer(f"model.layers.{index}.") for index in range(c.layers)),
            final_norm=self._floats(["model.norm.weight"], [c.hidden_size]),
            unembedding=unembedding,
        )

    def _tables(self) -> tuple[E, P]:
        c = self._config
        embedding = self._fused(["model.embed_tokens.weight"], [c.vocab_size], c.hidden_size)
        if c.tied_embeddings:
            return self._packing.tied(embedding)
        unembedding = self._fused(["lm_head.weight"], [c.vocab_size], c.hidden_size)
        return self._packing.embedding(embedding), self._packing.projection(unembedding)

    def _layer(self, prefix: str) -> LayerWeights[P]:
        c = self._config
        attention = prefix + "self_attn."
        qkv_names = [f"{attention}{part}_proj" for part in "qkv"]
        qkv_rows = [heads * c.head_dim for heads in (c.heads, c.kv_heads, c.kv_heads)]
        gate_up_names = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]
        down_name = prefix + "mlp.down_proj.weight"
        return LayerWeights(
            attention_norm=self._floats([prefix + "input_layernorm.weight"], [c.hidden_size]),
            qkv=self._packed([name + ".weight" for name in qkv_names], qkv_rows, c.hidden_size),
            qkv_bias=self._floats([name + ".bias" for name in qkv_names], qkv_rows) if c.qkv_bias else None,
            qk_norm=self._qk_norm(attention) if c.qk_norm else None,
            attention_output=self._packed(
                [attention + "o_proj.weight"], [c.hidden_size], c.heads * c.head_dim
            ),
            mlp_norm=self._floats([prefix + "post_attention_layernorm.weight"], [c.hidden_size]),
            gate_up=self._packing.gate_up(
                self._fused(gate_up_names, [c.intermediate_size] * 2, c.hidden_size)
            ),
            down=self._packed([down_name], [c.hidden_size], c.intermediate_size),
        )

    def _qk_norm(self, attention: str) -> Tensor:
        """The norms of q and k, one row per head, so that one op normalises all heads of both."""
        c = self._config
        both = self._floats([attention + "q_norm.weight", attention + "k_norm.weight"], [c.head_dim] * 2)
        q, k = both.view(2, c.head_dim)
        return torch.cat((q.expand(c.heads, -1), k.expand(c.kv_heads, -1)))

    def _packed(self, names: list[str], rows: list[int], columns: int) -> P:
        return self._packing.projection(self._fused(names, rows, columns))

    def _floats(self, names: list[str], rows: list[int]) -> Tensor:
        return self._fused(names, rows).floats()

    def _fused(self, names: list[str], rows: list[int], *columns: int) -> FusedTensor:
        return FusedTensor(self._source, names, rows, columns, self._dtype, self._device)
