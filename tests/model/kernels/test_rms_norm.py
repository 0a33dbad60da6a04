"""RMSNorm as one operation gives what the classes of transformers give, in value and gradient."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from luthier.model.kernels import rms_norm as module
from luthier.model.kernels.rms_norm import FORMS, RmsNorm, rms_norm

EPS = 1e-3
CLASSES = dict(zip(FORMS, (LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm), strict=True))
FORMATS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def given(x_dtype, weight_dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 32) * torch.logspace(-2, 1, 6)[:, None]
    return x.to(x_dtype).requires_grad_(), torch.randn(32).to(weight_dtype).requires_grad_()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_equations(form):
    x, weight = (one.detach().double().requires_grad_() for one in given(torch.float32, torch.float32))
    w = 1 + weight if form.adds_one else weight
    expected = w * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    torch.testing.assert_close(RmsNorm.apply(x, weight, EPS, form), expected)
    assert torch.autograd.gradcheck(lambda x, w: RmsNorm.apply(x, w, EPS, form), (x[:1], weight))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("formats", FORMATS)
def test_numbers_are_those_of_transformers(form, formats):
    (x, weight), (x2, weight2) = given(*formats), given(*formats)
    norm = CLASSES[form](32, EPS)
    norm.weight = torch.nn.Parameter(weight2.detach())
    found, expected = RmsNorm.apply(x, weight, EPS, form), norm(x2)
    assert found.dtype == expected.dtype
    torch.manual_seed(1)
    dy = torch.randn_like(expected)
    found.backward(dy)
    expected.backward(dy)
    rounding = 2e-2 if torch.bfloat16 in formats else 1e-5
    for one, other in ((found, expected), (x.grad, x2.grad), (weight.grad, norm.weight.grad)):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= rounding * other.float().norm()


def test_a_frozen_weight_gets_no_gradient_and_x_is_the_only_large_tensor_kept():
    x, weight = given(torch.float32, torch.float32)
    weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = RmsNorm.apply(x, weight, EPS, FORMS[0])
    assert sum(one.numel() == x.numel() for one in kept) == 1
    y.sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("formats", FORMATS[:2])
def test_the_kernel_of_a_gpu_computes_the_same(monkeypatch, form, formats):
    """Its operator is there on a CPU too. It rounds once, so in 16 bits it may differ in the last bit."""
    (x, weight), (x2, weight2) = given(*formats), given(*formats)
    expected = RmsNorm.apply(x2, weight2, EPS, form)
    calls = []
    monkeypatch.setattr(module, "has_kernel", lambda *args: calls.append(args) or True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rms_norm(x, weight, EPS, form)
    assert calls and found.dtype == expected.dtype
    torch.manual_seed(1)
    dy = torch.randn_like(expected)
    found.backward(dy)
    expected.backward(dy)
    rounding = 1e-2 if torch.bfloat16 in formats else 1e-5
    for one, other in ((found, expected), (x.grad, x2.grad), (weight.grad, weight2.grad)):
        assert (one - other).float().norm() <= rounding * other.float().norm()


def test_on_a_cpu_no_kernel_is_taken():
    x, weight = given(torch.float32, torch.float32)
    assert not module.has_kernel(x, weight)
