import hashlib

import pytest

from services.core.errors import ModelFileError
from services.model.config import ModelConfig, RopeScaling
from services.model.gguf_file import open_gguf


def test_the_default_model_is_described_as_published(default_model):
    model = open_gguf(default_model)
    assert model.name == "SmolLM2-135M-Instruct"
    assert model.weight_files == [default_model]
    assert model.config == ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        rms_norm_eps=pytest.approx(1e-5),
        rope_theta=100000.0,
        context_tokens_max=8192,
        tied_embeddings=True,
    )


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        ("Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Meta-Llama-3.1-8B-Instruct"),
        ("qwen2.5-0.5b-instruct-fp16.gguf", "qwen2.5-0.5b-instruct"),
        ("mistral-7b.IQ3_XXS.gguf", "mistral-7b"),
        ("model-q2.gguf", "model"),
        ("plain.gguf", "plain"),
    ],
)
def test_the_name_leaves_out_the_quantisation(write_gguf, file_name, name):
    assert open_gguf(write_gguf(name=file_name)).name == name


def test_the_tensors_tell_biases_norms_and_untied_embeddings(write_gguf):
    tensors = {"blk.0.attn_q.bias": (8,), "blk.0.attn_q_norm.weight": (4,), "output.weight": (5, 8)}
    plain = open_gguf(write_gguf(architecture="qwen2")).config
    varied = open_gguf(write_gguf({}, tensors, "qwen3")).config
    assert (plain.qkv_bias, plain.qk_norm, plain.tied_embeddings) == (False, False, True)
    assert (varied.qkv_bias, varied.qk_norm, varied.tied_embeddings) == (True, True, False)


def test_head_dim_is_the_stated_one_and_kv_heads_default_to_heads(write_gguf):
    stated = {"llama.attention.key_length": 16, "llama.attention.value_length": 16}
    config = open_gguf(write_gguf(stated | {"llama.attention.head_count_kv": None})).config
    assert (config.head_dim, config.kv_heads) == (16, 2)


def test_linear_rope_scaling_is_read(write_gguf):
    path = write_gguf({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert open_gguf(path).config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_a_window_smaller_than_the_context_slides_on_every_layer_of_llama(write_gguf):
    assert open_gguf(write_gguf({"llama.attention.sliding_window": 64})).config.sliding_window == 64
    assert open_gguf(write_gguf({"llama.attention.sliding_window": 128})).config.sliding_window is None


@pytest.mark.parametrize(
    ("metadata", "tensors", "architecture", "named"),
    [
        ({}, {}, "gemma2", "architecture 'gemma2'"),
        ({"llama.expert_count": 8}, {}, "llama", "a mixture of 8 experts"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "llama", "RoPE scaling 'yarn'"),
        ({"llama.rope.dimension_count": 2}, {}, "llama", "RoPE on 2 of 4"),
        ({"llama.attention.value_length": 2}, {}, "llama", "keys of 4 and values of 2"),
        ({"qwen2.attention.sliding_window": 64}, {}, "qwen2", "a sliding window of 64 tokens"),
        ({"split.count": 3}, {}, "llama", "one of 3 parts"),
        ({}, {"blk.0.attn_output.bias": (8,)}, "llama", "the bias attn_output.bias"),
        ({"llama.block_count": None}, {}, "llama", "block_count"),
        ({"llama.block_count": "many"}, {}, "llama", "block_count"),
        ({"llama.block_count": 0}, {}, "llama", "without layers"),
        ({}, {"token_embd.weight": (40,)}, "llama", "no tensor token_embd.weight"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_name(
    write_gguf, metadata, tensors, architecture, named
):
    path = write_gguf(metadata, tensors, architecture)
    with pytest.raises(ModelFileError) as caught:
        open_gguf(path)
    assert str(path) in caught.value.message
    assert named in caught.value.message


def test_the_revision_is_the_files_digest_and_is_remembered_at_home(write_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))
    path = write_gguf()
    assert open_gguf(path).revision() == hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    assert (tmp_path / "home" / "revisions.json").is_file()
