"""config.json of a Hugging Face folder -> ModelConfig, for the architectures the engine computes exactly.

Whatever would change the numbers and is not supported is refused here by name, before any weight is
read. To support an architecture: add its name, and its rules where they differ from Llama's.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from services.core.errors import ModelFileError
from services.model.config import ModelConfig, RopeScaling

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MISTRAL_WINDOW_DEFAULT = 4096  # tokens, of transformers' MistralConfig if the key is absent
QWEN3_HEAD_DIM_DEFAULT = 128

T = TypeVar("T")


class _ConfigJson(msgspec.Struct, frozen=True):
    """The keys that we read, named as in the file."""

    architectures: list[str]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict[str, Any] | None = None  # transformers 5
    rope_theta: float | None = None  # transformers 4, as is the next one
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


class _RopeJson(msgspec.Struct, frozen=True):
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float = 1.0


def read_json(path: Path, shape: type[T]) -> T:
    """The file's content as `shape`. Raises ModelFileError if it is missing or does not fit."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=shape)
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{path} is missing. Download the model's whole folder again, or give another --model."
        ) from error
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read ({error}). Check the path and its permissions."
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"{path} does not hold what is expected ({error}). Delete it and download it again."
        ) from error


def hf_config(path: Path) -> ModelConfig:
    """`path` is a config.json. Raises ModelFileError, naming it, for what is missing or unsupported."""
    raw = read_json(path, _ConfigJson)
    architecture = _architecture(path, raw)
    _refuse_variants(path, raw)
    theta, scaling = _rope(path, raw)
    head_dim = raw.head_dim or (
        QWEN3_HEAD_DIM_DEFAULT
        if architecture == "Qwen3ForCausalLM"
        else raw.hidden_size // raw.num_attention_heads
    )
    return ModelConfig(
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        layers=raw.num_hidden_layers,
        heads=raw.num_attention_heads,
        kv_heads=raw.num_key_value_heads or raw.num_attention_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.rms_norm_eps,
        rope_theta=theta,
        context_tokens_max=raw.max_position_embeddings,
        rope_scaling=scaling,
        tied_embeddings=raw.tie_word_embeddings,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(path, raw, architecture),
    )


def _unsupported(path: Path, feature: str) -> ModelFileError:
    return ModelFileError(f"{path} has {feature}, which is not supported. Choose another model.")


def _architecture(path: Path, raw: _ConfigJson) -> str:
    if len(raw.architectures) != 1 or raw.architectures[0] not in ARCHITECTURES:
        raise _unsupported(
            path, f"architectures {raw.architectures} (supported: one of {', '.join(ARCHITECTURES)})"
        )
    if min(raw.num_hidden_layers, raw.num_attention_heads, raw.hidden_size) < 1:
        raise _unsupported(path, "no layers, heads or hidden dimensions")
    return raw.architectures[0]


def _refuse_variants(path: Path, raw: _ConfigJson) -> None:
    # In Llama and Qwen3 attention_bias also puts a bias on o_proj, which the engine has no place for.
    if raw.attention_bias:
        raise _unsupported(path, "attention_bias = true (a bias on o_proj)")
    if raw.mlp_bias:
        raise _unsupported(path, "mlp_bias = true")
    if raw.hidden_act != "silu":
        raise _unsupported(path, f"hidden_act {raw.hidden_act!r} (supported: 'silu')")
    if raw.quantization_config is not None:
        method = raw.quantization_config.get("quant_method", "unknown")
        raise _unsupported(path, f"quantization_config with quant_method {method!r}")


def _rope(path: Path, raw: _ConfigJson) -> tuple[float, RopeScaling]:
    """The base of the frequencies and their scaling, from either generation's keys."""
    given = raw.rope_parameters or raw.rope_scaling or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or any(
        isinstance(value, dict) for value in given.values()
    ):
        shown = repr(kind) if kind != "default" else "that differs by layer"
        raise _unsupported(path, f"RoPE scaling {shown} (supported: default, linear, llama3)")
    fallback = {} if raw.rope_theta is None else {"rope_theta": raw.rope_theta}
    try:
        rope = msgspec.convert(fallback | given, _RopeJson)
    except msgspec.ValidationError as error:
        raise ModelFileError(
            f"{path}: its RoPE parameters do not fit ({error}). Download it again."
        ) from error
    if rope.partial_rotary_factor != 1.0:
        raise _unsupported(path, f"partial_rotary_factor {rope.partial_rotary_factor}")
    if kind == "default":
        return rope.rope_theta, RopeScaling()
    if kind == "linear":
        return rope.rope_theta, RopeScaling(kind="linear", factor=rope.factor)
    return rope.rope_theta, RopeScaling(
        kind="llama3",
        factor=rope.factor,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        original_context=rope.original_max_position_embeddings or raw.max_position_embeddings,
    )


def _sliding_window(path: Path, raw: _ConfigJson, architecture: str) -> int | None:
    """Tokens, or None if every layer sees everything. One window for all layers, or none."""
    if architecture == "LlamaForCausalLM":
        return None
    layers = raw.num_hidden_layers
    if architecture == "MistralForCausalLM":
        window = MISTRAL_WINDOW_DEFAULT if raw.sliding_window is msgspec.UNSET else raw.sliding_window
        sliding = 0 if window is None else layers
    else:
        window = raw.sliding_window if isinstance(raw.sliding_window, int) else None
        if not raw.use_sliding_window:
            window = None
        sliding = 0 if window is None else max(0, layers - raw.max_window_layers)
    if raw.layer_types is not None:
        sliding = raw.layer_types.count("sliding_attention")
    if sliding == 0:
        return None
    if sliding < layers:
        raise _unsupported(path, f"a sliding window on {sliding} of {layers} layers")
    return window
