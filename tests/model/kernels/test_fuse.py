"""With and without kernels a model has the same loss and gradients, and what computes otherwise is left alone."""

import collections
import copy

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.adapters.lora import LoraConfig
from luthier.model.attention import isolate_samples
from luthier.model.kernels import fuse as fuse_module
from luthier.model.kernels.fuse import fuse, gated_activation, norm_form
from luthier.model.kernels.rms_norm import FORMS
from luthier.model.kernels.swiglu import SILU
from luthier.model.loading.training import prepare_for_training
from luthier.workflow.plan.trace import Affirming, Batch, trace_step
from tests.matrix import representatives
from tests.runs.test_architectures import ARCHITECTURES, IDS, build
from tests.tiny import TINY_LLAMA

LLAMA, OLMO, GEMMA = FORMS
FOUND = {
    "llama": {LLAMA: 5, SILU: 2},
    "olmo2": {OLMO: 9, SILU: 2},
    "qwen3_next": {GEMMA: 7, SILU: 2},
    "gpt_oss": {OLMO: 5},
    "phi3": {LLAMA: 5},
    "gpt2": {},
}


def adapted(name):
    model = build(name)
    model = ADAPTERS.get("lora").apply(model, LoraConfig(lora_rank=2), given=GivenAdapters(), pure_bf16=False)
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    return model.train()


def loss_and_grads(model, dtype=None):
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def assert_same(found, expected, rounding):
    assert (found[0] - expected[0]).abs() <= rounding * expected[0].abs()
    assert found[1].keys() == expected[1].keys()
    largest = max(grad.norm() for grad in expected[1].values())
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= 10 * rounding * grad.norm() + rounding * 1e-2 * largest, name


@pytest.mark.parametrize("name", representatives(ARCHITECTURES, "llama", "gemma2", "olmo2", "qwen3_next", "gpt_oss"))
def test_losses_and_gradients_stay_the_same(name):
    model = adapted(name)
    fused = copy.deepcopy(model)
    fuse(fused)
    assert_same(loss_and_grads(fused), loss_and_grads(model), 1e-5)


@pytest.mark.parametrize("trains_all", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_with_gradient_checkpointing_and_trained_weights(checkpoints, trains_all):
    model = build("llama").train() if trains_all else adapted("llama")
    if checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    fused = copy.deepcopy(model)
    fuse(fused)
    assert_same(loss_and_grads(fused), loss_and_grads(model), 1e-5)


def test_in_16_bits_they_are_as_near_to_float32():
    exact, model = loss_and_grads(adapted("llama"))[1], adapted("llama")
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    fused = copy.deepcopy(model)
    fuse(fused)
    plain, fast = (loss_and_grads(one, torch.bfloat16)[1] for one in (model, fused))
    of_plain, of_fast = (sum((g[n] - exact[n]).norm() / exact[n].norm() for n in exact).item() for g in (plain, fast))
    assert of_fast < 1.1 * of_plain


@pytest.mark.parametrize("name", FOUND)
def test_modules_are_known_by_what_they_compute(name):
    found = collections.Counter()
    for module in build(name).modules():
        found.update(one for one in (norm_form(module), gated_activation(module)) if one is not None)
    assert found == FOUND[name]


class DoublingNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class ClampingMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-0.5, 0.5))


class DroppingMLP(LlamaMLP):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), self.config.resid_dropout, self.training)


@pytest.mark.parametrize("is_planned", [False, True])
def test_modules_that_compute_otherwise_are_left_alone(is_planned):
    """On `meta` too, where any question about numbers would be answered with yes."""
    config = LlamaConfig(**TINY_LLAMA)
    config.resid_dropout = 0.5
    if not is_planned:
        assert norm_form(DoublingNorm(8)) is None and norm_form(LlamaRMSNorm(8)) is LLAMA
        assert gated_activation(ClampingMLP(config)) is None and gated_activation(DroppingMLP(config)) is None
        return
    with torch.device("meta"), Affirming():
        assert norm_form(DoublingNorm(8)) is None and norm_form(LlamaRMSNorm(8)) is LLAMA
        assert gated_activation(ClampingMLP(config)) is None and gated_activation(LlamaMLP(config)) is SILU


class ScaledNorm(LlamaRMSNorm):
    def __init__(self, factor):
        super().__init__(8)
        self.factor = factor

    def forward(self, hidden_states):
        return self.factor * super().forward(hidden_states)


def test_layers_that_are_alike_are_tried_once_and_others_by_themselves(monkeypatch):
    tried = []
    computes = fuse_module._computes
    monkeypatch.setattr(fuse_module, "_computes", lambda module, form: tried.append(module) or computes(module, form))
    model = nn.ModuleList([ScaledNorm(1), ScaledNorm(2), ScaledNorm(1), LlamaRMSNorm(8), LlamaRMSNorm(8)])
    fuse(model)
    assert ["forward" in vars(norm) for norm in model] == [True, False, True, True, True]
    assert [any(one is norm for one in tried) for norm in model] == [True, True, False, True, False]


def test_random_numbers_are_not_touched():
    config = LlamaConfig(**TINY_LLAMA)
    config.resid_dropout = 0.5
    model = nn.ModuleList([LlamaForCausalLM(config), DroppingMLP(config)])
    before = torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_on_the_last_layer_of_an_mlp_see_its_input():
    model, seen = adapted("llama"), []
    expected = loss_and_grads(copy.deepcopy(model))
    fuse(model)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert_same(loss_and_grads(model), expected, 1e-5)
    assert seen == [(1, IDS.shape[1], layer.in_features)]


def test_other_arguments_go_to_the_own_forward():
    norm = LlamaRMSNorm(8)
    expected = norm(hidden_states=torch.ones(2, 8))
    model = nn.ModuleList([norm])
    fuse(model)
    torch.testing.assert_close(norm(hidden_states=torch.ones(2, 8)), expected)


def test_without_the_fast_path_nothing_is_replaced():
    for fast_path in (False, True):
        model = adapted("llama")
        prepare_for_training(model, gradient_checkpointing=False, fast_path=fast_path)
        num_replaced = sum("forward" in vars(module) for module in model.modules())
        assert num_replaced == (14 + 5 + 2 + 2 if fast_path else 0)


def num_operations(num_layers, adapted):
    """That a step dispatches on the path of a GPU, by a trace of tensors without data."""
    with torch.device("meta"), Affirming():
        model = LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, "num_hidden_layers": num_layers})).bfloat16()
        if adapted:
            model = get_peft_model(model, PeftConfig(r=4, target_modules="all-linear"))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        fuse(model)
    isolate_samples(model)
    batch = Batch((24, 40), 30)
    trace = trace_step(model.train(), batch, reads="cross_entropy", half=torch.bfloat16, on_device=True)
    return sum(trace.calls.values())


@pytest.mark.parametrize(("adapted", "most"), [(True, 80), (False, 84)])
def test_a_block_dispatches_few_operations(monkeypatch, adapted, most):
    """A GPU waits while the CPU starts them. There an RMSNorm is one kernel in each direction; tensors without data
    have none, so another operation stands for it."""
    monkeypatch.setattr(fuse_module, "rms_norm", lambda x, *_: x.neg())
    one, three = (num_operations(num_layers, adapted) for num_layers in (1, 3))
    assert (three - one) / 2 <= most, (one, three)
