"""LoRA and DoRA as one operation give what peft's layers give, and step aside wherever these do more."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.config.keys.quantization import QuantizationConfig
from luthier.model.kernels.lora_layers import fuse_lora, project_gated
from luthier.model.kernels.swiglu import SILU
from luthier.model.quantization import bnb, hqq
from tests.tiny import TINY_LLAMA

NUM_LAYERS = 14
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(40).view(2, 20)


def lora(quantizer=None, **keys):
    """A tiny model with adapters on all linear layers that are not zero."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA, attention_bias=True))
    if quantizer is not None:
        quantize(base, quantizer)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | keys))
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data *= 1 + 0.2 * torch.randn_like(weight)
        elif weight.requires_grad or "bias" in name:
            nn.init.normal_(weight, std=0.2)
    return model.train()


def quantize(model, quantizer):
    model.is_loaded_in_4bit = quantizer is bnb
    keys = QuantizationConfig(quantization_bit=4)
    for name, layer in list(model.model.named_modules()):
        if type(layer) is nn.Linear:
            low_bit = quantizer.linear(layer, keys, torch.float32, torch.device("cpu"))
            model.model.set_submodule(name, low_bit)


def loss_and_grads(model, dtype=None):
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def both(model, dtype=None):
    """(loss, gradients) by peft, and by the fused layers of a copy."""
    fused = copy.deepcopy(model)
    return loss_and_grads(model, dtype), (fuse_lora(fused), *loss_and_grads(fused, dtype))


@pytest.mark.parametrize(
    "keys", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"use_dora": True}]
)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_losses_and_gradients_are_those_of_peft(keys, checkpoints):
    model = lora(**keys).double()
    if checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    (loss, grads), (count, fused_loss, fused_grads) = both(model)
    assert count == (4 if "target_modules" in keys else NUM_LAYERS)
    torch.testing.assert_close(fused_loss, loss)
    assert fused_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, atol=1e-9 * grad.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("quantizer", [bnb, hqq], ids=["bnb", "hqq"])
def test_weights_of_4_bits_are_dequantized_and_not_kept(quantizer, use_dora):
    model = lora(quantizer, use_dora=use_dora, target_modules=PROJECTIONS)
    loss, grads = loss_and_grads(model)
    assert fuse_lora(model) == NUM_LAYERS
    fused_loss, fused_grads = loss_and_grads(model)
    torch.testing.assert_close(fused_loss, loss, atol=0, rtol=1e-5)
    assert fused_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert (fused_grads[name] - grad).norm() <= 1e-4 * grad.norm()

    layer, kept = model.base_model.model.model.layers[0].mlp.up_proj, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(3, layer.in_features, requires_grad=True))
    assert layer.in_features * layer.out_features not in kept


def test_the_product_of_an_mlp_is_not_kept():
    model = lora()
    fuse_lora(model)
    layer, kept = model.base_model.model.model.layers[0].mlp.down_proj, []
    gate, up = (torch.randn(2, 5, layer.in_features, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = project_gated(layer, gate, up, SILU)
    assert sum(one.numel() == gate.numel() for one in kept) == 2
    torch.testing.assert_close(y, layer(SILU.apply(gate) * up))


def test_under_autocast_they_are_as_near_to_float32_as_those_of_peft():
    exact = loss_and_grads(lora())[1]
    model = lora()
    for name, weight in model.named_parameters():
        if "base_layer" in name:
            weight.data = weight.data.bfloat16()
    (_, peft), (_, _, fused) = both(model, torch.bfloat16)
    assert all(grad.dtype == torch.float32 for grad in fused.values())
    of_peft, of_fused = (
        sum((grads[name] - exact[name]).norm() / exact[name].norm() for name in exact).item() for grads in (peft, fused)
    )
    assert of_fused < 1.2 * of_peft


@pytest.mark.parametrize(
    "keys",
    [{"lora_dropout": 0.5}, {"lora_dropout": 0.5, "use_dora": True}, {"lora_bias": True}],
    ids=["dropout", "DoRA", "bias"],
)
def test_layers_that_do_more_are_left_to_peft(keys):
    assert fuse_lora(lora(**keys)) == 0


def test_dropout_that_is_switched_off_is_none():
    model = lora(lora_dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert fuse_lora(model) == NUM_LAYERS


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,)])
def test_inputs_without_tokens(shape, use_dora):
    """An expert that no token was sent to."""
    model = lora(use_dora=use_dora)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.ones(*shape, layer.in_features)
    expected = layer(x)
    fuse_lora(model)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(torch.isfinite(w.grad).all() for w in layer.parameters() if w.requires_grad)


def test_disabled_merged_and_other_adapters_are_left_to_peft():
    model = lora()
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    with torch.no_grad():
        with model.disable_adapter(), fused.disable_adapter():
            assert torch.equal(fused(IDS).logits, model(IDS).logits)
        for one in (model, fused):
            one.merge_adapter()
        assert torch.equal(fused(IDS).logits, model(IDS).logits)
        for one in (model, fused):
            one.unmerge_adapter()
            torch.manual_seed(1)
            one.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
            one.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(fused(IDS).logits, model(IDS).logits)


def test_hooks_on_the_layers_within_are_called():
    model, seen = lora(), []
    fuse_lora(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(IDS)
    assert len(seen) == 1
    layer.base_layer.weight.requires_grad_()
    loss_and_grads(model)
    assert layer.base_layer.weight.grad is not None
