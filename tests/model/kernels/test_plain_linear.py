"""Linear layers whose products are those of oneDNN: the values and gradients of PyTorch's own layer."""

import copy

import pytest
import torch
from torch import nn

from luthier.model.kernels import plain_linear, products
from luthier.model.kernels.fuse import fuse
from luthier.model.kernels.plain_linear import PlainForward, has_own_products

needs_kernel = pytest.mark.skipif(not products.has_kernel(torch.float32), reason="oneDNN is not in this PyTorch")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    for name in ("MANY", "MANY_READ"):
        monkeypatch.setattr(products, name, 0)
    for module in (products, plain_linear):
        monkeypatch.setattr(module, "is_better_here", lambda: True)
    monkeypatch.setattr(products, "is_better_for_wide", lambda: True)
    monkeypatch.setattr(plain_linear, "LEAST_WEIGHTS", 100)


@needs_kernel
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)], ids=["both", "input", "weight"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_layer(bias, learns):
    torch.manual_seed(0)
    layer = nn.Linear(24, 10, bias=bias).requires_grad_(learns[1])
    x = torch.randn(2, 7, 24, requires_grad=learns[0])
    dy = torch.randn(2, 7, 10)
    learned = [one for one in (x, *layer.parameters()) if one.requires_grad]
    expected = layer(x)
    grads = torch.autograd.grad(expected, learned, dy)
    layer.forward = PlainForward(layer)
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(found, learned, dy), grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("holds", [torch.bfloat16, torch.float32], ids=["pure", "autocast"])
def test_in_16_bits_without_a_kernel_for_them_too(monkeypatch, holds, bias):
    """Weights of 16 bits, or float32 ones that autocast rounds."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 10, bias=bias).to(holds)
    x = torch.randn(2, 8, 24, dtype=holds, requires_grad=True)
    dy = torch.randn(2, 8, 10).bfloat16()
    learned = [x, *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=holds is torch.float32):
        expected = layer(x)
        grads = torch.autograd.grad(expected, learned, dy)
        monkeypatch.setattr(products, "has_half_kernel", lambda dtype: False)
        layer.forward = PlainForward(layer)
        found = layer(x)
    assert "PlainLinear" in found.grad_fn.next_functions[0][0].name() and found.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, learned, dy), grads, strict=True):
        assert one.dtype is holds
        torch.testing.assert_close(one, other, rtol=2**-6, atol=1e-2)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 24)])
@pytest.mark.parametrize("is_faster", [True, False])
def test_what_the_kernel_does_not_compute_is_left_to_pytorch(monkeypatch, shape, is_faster):
    layer = nn.Linear(24, 10)
    expected = layer(torch.ones(shape))
    monkeypatch.setattr(plain_linear, "is_faster", lambda x, weight: is_faster and len(x) > 0)
    layer.forward = PlainForward(layer)
    torch.testing.assert_close(layer(torch.ones(shape)), expected)


@needs_kernel
def test_large_plain_layers_are_changed_and_a_copy_has_its_own():
    class Other(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(4, 4), Other(16, 16), nn.Linear(16, 16).bfloat16()])
    fuse(model)
    assert [has_own_products(layer) for layer in model] == [True, False, False, True]
    twin = copy.deepcopy(model)
    assert twin[0].forward.layer is twin[0]


@needs_kernel
def test_layers_under_adapters_are_fused_with_them_as_before(monkeypatch):
    from peft import LoraConfig, get_peft_model

    from luthier.model.kernels.lora_layers import can_be_fused

    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoraConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0]
    fuse(model)
    assert has_own_products(layer.base_layer) and can_be_fused(layer)
    calls = []
    monkeypatch.setattr(plain_linear, "product", lambda *args: calls.append(args) or products.product(*args))
    with model.disable_adapter():
        model(torch.randn(3, 16))
    assert len(calls) == 1


@pytest.mark.parametrize("has_half_kernel", [True, False])
def test_nothing_changes_on_processors_for_which_pytorch_is_as_fast(monkeypatch, has_half_kernel):
    monkeypatch.setattr(plain_linear, "is_better_here", lambda: False)
    monkeypatch.setattr(plain_linear, "has_half_kernel", lambda dtype: has_half_kernel)
    model = nn.Sequential(nn.Linear(16, 16))
    fuse(model)
    assert has_own_products(model[0]) is not has_half_kernel
