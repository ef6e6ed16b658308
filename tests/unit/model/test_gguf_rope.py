import numpy as np
import pytest

from services.core.errors import ModelFileError
from services.model.config import RopeScaling
from services.model.gguf_file import open_gguf
from services.model.gguf_rope import llama3_divisors

THETA, HEAD_DIM = 500000.0, 64
LLAMA_3_2 = RopeScaling(kind="llama3", factor=32.0)


def _llama3_file(write_gguf, divisors, **metadata):
    shape = {"llama.attention.key_length": HEAD_DIM, "llama.attention.value_length": HEAD_DIM}
    return write_gguf(
        shape | {"llama.rope.freq_base": THETA} | metadata,
        {"rope_freqs.weight": np.asarray(divisors, np.float32)},
    )


@pytest.fixture(scope="module")
def transformers_divisors():
    """What transformers divides the frequencies by, for Llama 3.2's parameters."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": THETA, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=2 * HEAD_DIM, num_attention_heads=2, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    return THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM) / scaled.numpy()


def test_divisors_are_those_of_transformers(transformers_divisors):
    np.testing.assert_allclose(llama3_divisors(LLAMA_3_2, HEAD_DIM, THETA), transformers_divisors, rtol=1e-5)


def test_llama3_parameters_are_found_from_the_factors_in_the_file(write_gguf, transformers_divisors):
    path = _llama3_file(write_gguf, transformers_divisors)
    assert open_gguf(path).config.rope_scaling == RopeScaling(
        kind="llama3",
        factor=pytest.approx(32.0),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=8192,
    )


def test_factors_of_one_are_no_scaling(write_gguf):
    assert open_gguf(_llama3_file(write_gguf, np.ones(HEAD_DIM // 2))).config.rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    ("divisors", "named"),
    [(np.linspace(1, 8, HEAD_DIM // 2), "not those of Llama 3"), (np.ones(3), "must hold 32 float32 values")],
)
def test_other_factors_are_refused(write_gguf, divisors, named):
    path = _llama3_file(write_gguf, divisors)
    with pytest.raises(ModelFileError) as caught:
        open_gguf(path)
    assert str(path) in caught.value.message
    assert named in caught.value.message
