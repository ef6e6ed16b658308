import pytest
import torch

from kernels import ops

SHAPES = [(1, 1), (7, 3), (33, 65), (576, 1536), (97, 1201)]  # outputs, inputs


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 32])
def test_linear_equals_a_float64_product(outputs: int, inputs: int, tokens: int) -> None:
    x, weight, bias = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    expected = x.double() @ weight.double().T
    packed = ops.pack_weight(weight)
    tolerance = 1e-5 * inputs**0.5 * 4
    assert torch.allclose(ops.linear(x, packed).double(), expected, atol=tolerance)
    assert torch.allclose(ops.linear(x, packed, bias).double(), expected + bias, atol=tolerance)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_packed_linear_of_a_token_is_bitwise_the_same_in_every_batch(outputs: int, inputs: int) -> None:
    packed = ops.pack_weight(torch.randn(outputs, inputs))
    assert packed.is_mkldnn
    x = torch.randn(40, inputs)
    whole = ops.linear(x, packed)
    for first, last in ((0, 1), (0, 2), (3, 8), (39, 40), (5, 38)):
        assert torch.equal(ops.linear(x[first:last], packed), whole[first:last])


def test_linear_of_half_precision_weights_stays_in_their_dtype() -> None:
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    y = ops.linear(x, ops.pack_weight(weight))
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), x.float() @ weight.float().T, rtol=0.02, atol=0.05)
