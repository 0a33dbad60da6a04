"""What aqlm does to its layers on a CPU, and what this package has them do.

If the test of the plain library fails, the library has been mended, and `luthier.model.compat.aqlm_cpu` can go.
"""

import pytest
import torch

from luthier.model.compat.aqlm_cpu import use_dequantized_matmul

aqlm = pytest.importorskip("aqlm", reason="the library aqlm is not installed")
BOOKS = [(2, 8), (1, 8), (1, 16), (2, 12)]


def layer_and_weight(num_codebooks: int, bits: int, num_in: int = 64, num_out: int = 128):
    """A random layer with a bias, and its weight from the definition."""
    torch.manual_seed(0)
    layer = aqlm.QuantizedLinear(num_in, num_out, 8, 1, num_codebooks, bits, bias=True)
    for parameter in (layer.codebooks, layer.scales, layer.bias):
        parameter.data = torch.randn(parameter.shape)
    codes = torch.randint(2**bits, layer.codes.shape)
    layer.codes.data = torch.where(codes < 2 ** (bits - 1), codes, codes - 2**bits).to(layer.codes.dtype)
    vectors = sum(layer.codebooks[book, codes[..., book], 0] for book in range(num_codebooks))
    return layer, layer.scales[:, 0, 0] * vectors.reshape(num_out, num_in)


@pytest.mark.parametrize(("num_codebooks", "bits"), BOOKS)
@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize("num_out", [64, 128])
def test_the_product_and_its_gradient_are_those_of_the_weight(num_codebooks, bits, num_tokens, num_out):
    layer, weight = layer_and_weight(num_codebooks, bits, num_out=num_out)
    use_dequantized_matmul(torch.nn.Sequential(layer))
    x = torch.randn(1, num_tokens, 64, requires_grad=True)
    out, given = layer(x), torch.randn(1, num_tokens, num_out)
    assert torch.allclose(out, x @ weight.T + layer.bias, atol=1e-4)
    assert torch.allclose(torch.autograd.grad(out, x, given)[0], given @ weight, atol=1e-4)


def test_plain_aqlm_has_no_gradient_for_codebooks_of_256():
    layer, _ = layer_and_weight(2, 8)
    x = torch.randn(1, 3, 64, requires_grad=True)
    with pytest.raises(RuntimeError):
        layer(x).sum().backward()
