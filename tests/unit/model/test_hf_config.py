import json

import pytest

from services.core.errors import ModelFileError
from services.model.config import ModelConfig, RopeScaling
from services.model.hf_config import hf_config

MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPECTED = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "layers": 4,
    "heads": 8,
    "kv_heads": 2,
    "context_tokens_max": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


@pytest.fixture
def read(tmp_path):
    def read(changes: dict) -> ModelConfig:
        content = {key: value for key, value in (MINIMAL | changes).items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return hf_config(tmp_path / "config.json")

    return read


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("Llama", {"tie_word_embeddings": True}, {"head_dim": 8, "tied_embeddings": True}),
        ("Llama", {"head_dim": 32, "rms_norm_eps": 1e-5}, {"head_dim": 32, "rms_norm_eps": 1e-5}),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
            {"head_dim": 8, "rope_theta": 500000.0, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)},
        ),
        ("Mistral", {"sliding_window": 32}, {"head_dim": 8, "sliding_window": 32}),
        ("Mistral", {"sliding_window": None}, {"head_dim": 8}),
        ("Qwen2", {}, {"head_dim": 8, "qkv_bias": True}),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
            {"head_dim": 8, "qkv_bias": True, "sliding_window": 16},
        ),
        ("Qwen3", {}, {"head_dim": 128, "qk_norm": True}),
        ("Qwen3", {"head_dim": 16, "use_sliding_window": True}, {"head_dim": 16, "qk_norm": True}),
    ],
)
def test_what_transformers_saves_is_read_back(tmp_path, kind, arguments, expected):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **SIZES, **arguments, architectures=[f"{kind}ForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    assert hf_config(tmp_path / "config.json") == ModelConfig(**(EXPECTED | expected))


def test_absent_keys_mean_what_they_mean_in_transformers(read):
    config = read({})
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (8, 8, 10000.0)
    assert (config.tied_embeddings, config.rms_norm_eps, config.sliding_window) == (False, 1e-6, None)
    assert read({"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128
    assert read({"architectures": ["MistralForCausalLM"]}).sliding_window == 4096


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 1e6}, 1e6, RopeScaling()),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, RopeScaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, RopeScaling("linear", 2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, 3e4, RopeScaling()),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 3e4, "factor": 4}},
            3e4,
            RopeScaling("linear", 4.0),
        ),
    ],
)
def test_rope_is_read_from_the_keys_of_both_generations(read, rope, theta, scaling):
    config = read(rope)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_a_window_that_is_not_used_is_no_window(read, architecture):
    unused = {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 0}
    assert read({"architectures": [architecture], **unused}).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": []}, "architectures []"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "RoPE scaling 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs by layer"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "RoPE parameters"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 64,
                "max_window_layers": 3,
            },
            "on 1 of 4 layers",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            "on 2 of 4 layers",
        ),
        ({"num_attention_heads": 0}, "no layers, heads"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_name(read, tmp_path, changes, named):
    with pytest.raises(ModelFileError) as caught:
        read(changes)
    assert str(tmp_path / "config.json") in caught.value.message
    assert named in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_broken_file_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"config\.json .* Delete it and download it again"):
        hf_config(tmp_path / "config.json")


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ModelFileError, match=r"config\.json is missing\. Download"):
        hf_config(tmp_path / "config.json")
