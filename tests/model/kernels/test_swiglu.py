"""The gated product gives what autograd makes of act(g) * u, and keeps g and u only."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from luthier.model.kernels.swiglu import GELU, GELU_TANH, SILU, GatedProduct, activation_of

ACTIVATIONS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}


def pair(dtype):
    torch.manual_seed(0)
    return [torch.randn(2, 3, 5, dtype=dtype, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_value_and_gradients(activation):
    gate, up = pair(torch.float64)
    torch.testing.assert_close(GatedProduct.apply(gate, up, activation), activation.apply(gate) * up)
    assert torch.autograd.gradcheck(lambda g, u: GatedProduct.apply(g, u, activation), (gate, up))


def test_in_16_bits_every_number_is_that_of_autograd():
    (gate, up), (gate2, up2) = pair(torch.bfloat16), pair(torch.bfloat16)
    found, expected = GatedProduct.apply(gate, up, SILU), SILU.apply(gate2) * up2
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(gate.grad, gate2.grad) and torch.equal(up.grad, up2.grad)


def test_two_tensors_are_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gate, up = pair(torch.float32)
        GatedProduct.apply(gate, up, SILU)
    assert len(kept) == 2 and kept[0] is gate and kept[1] is up


def test_activations_are_known_by_their_module():
    named = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH, "relu": None, "quick_gelu": None}
    assert {name: activation_of(ACT2FN[name]) for name in named} == named
    assert activation_of(nn.GELU()) is GELU and activation_of(nn.GELU("tanh")) is GELU_TANH
