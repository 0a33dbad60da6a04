"""A block that is computed again leaves out its last product where no gradient depends on it, and nowhere else."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.adapters.lora import LoraConfig
from luthier.model.kernels import block_end, fuse, plain_linear
from luthier.model.kernels.block_end import only_adds_mlp
from luthier.model.kernels.products import has_kernel
from luthier.model.loading.training import prepare_for_training
from tests.matrix import representatives
from tests.runs.test_architectures import ARCHITECTURES, IDS, build

KEPT = {"gemma2", "gemma3_text", "exaone4", "olmo2"}
"""Dense models whose blocks read what the MLP puts out, in a norm."""
LEARNS = {"full": None, "lora": ("all",), "lora on q_proj": ("q_proj",)}


def made(name, learns="full"):
    model, target = build(name), LEARNS[learns]
    if target is not None:
        keys = LoraConfig(lora_rank=2, lora_target=target)
        model = ADAPTERS.get("lora").apply(model, keys, given=GivenAdapters(), pure_bf16=False)
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    return model


def checkpointed(model, *, use_reentrant=True):
    prepare_for_training(model, fast_path=True, use_reentrant=use_reentrant)
    return model


@pytest.fixture
def left_out(monkeypatch):
    """Each time a product is left out, an entry. What was not computed is NaN."""
    calls = []
    original = fuse._gated_mlp_unread
    monkeypatch.setattr(
        fuse, "_gated_mlp_unread", lambda *args, **given: calls.append(args[0]) or original(*args, **given)
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield calls
    torch.use_deterministic_algorithms(False)


def gradients(model, dtype=None):
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", representatives(ARCHITECTURES, "llama", "qwen3", "gemma2"))
@pytest.mark.parametrize("learns", ["full", "lora"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same_to_the_bit(name, learns, use_reentrant, left_out):
    model = made(name, learns)
    other = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_end, "only_adds_mlp", lambda *_: False)
        expected = gradients(checkpointed(other))
    assert not left_out
    found = gradients(checkpointed(model, use_reentrant=use_reentrant))
    assert found.keys() == expected.keys()
    assert all(torch.equal(grad, expected[key]) for key, grad in found.items())


@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_block_of_a_llama_leaves_its_product_out(learns, dtype, left_out):
    model = made("llama", learns)
    other = copy.deepcopy(model)
    found = gradients(checkpointed(model), dtype)
    assert len(left_out) == model.config.num_hidden_layers
    prepare_for_training(other, gradient_checkpointing=False, fast_path=True)
    expected = gradients(other, dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(grad, expected[key]) for key, grad in found.items()), "as without checkpointing"


@pytest.mark.parametrize("name", sorted(KEPT & set(ARCHITECTURES)))
def test_blocks_that_read_the_numbers_compute_them(name, left_out):
    gradients(checkpointed(made(name)))
    assert not left_out


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_hook_that_may_read_the_numbers_gets_them(use_reentrant, left_out):
    model = checkpointed(made("llama"), use_reentrant=use_reentrant)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    gradients(model)
    assert not left_out


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            self.count += result.numel() * args[-2].shape[-1]
        elif name == "_linear_pointwise":
            self.count += result.numel() * args[0].shape[-1]
        return result


def products(model, dtype=None):
    with Products() as counter:
        gradients(model, dtype)
    return counter.count


@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("own_products", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_both_ways_leave_out_the_last_product(learns, dtype, own_products, use_reentrant, left_out, monkeypatch):
    """PyTorch's way that is not reentrant stops before the product of a layer that keeps its input first."""
    if own_products:
        if not has_kernel(torch.float32):
            pytest.skip("this PyTorch has no oneDNN")
        monkeypatch.setattr(plain_linear, "is_better_here", lambda: True)
        monkeypatch.setattr(plain_linear, "LEAST_WEIGHTS", 0)
        monkeypatch.setattr(plain_linear, "is_faster", lambda x, weight: not torch.is_autocast_enabled("cpu"))
    model = made("llama", learns)
    other, config = copy.deepcopy(model), model.config
    found = products(checkpointed(model, use_reentrant=use_reentrant), dtype)
    with monkeypatch.context() as patch, set_checkpoint_early_stop(False):
        patch.setattr(block_end, "only_adds_mlp", lambda *_: False)
        all_of_them = products(checkpointed(other, use_reentrant=use_reentrant), dtype)
    inner = config.intermediate_size + (2 if learns == "lora" else 0)
    last = IDS.numel() * config.num_hidden_layers * inner * config.hidden_size
    assert left_out and found == all_of_them - last


def test_the_mlp_computes_as_before_afterwards(left_out):
    model = checkpointed(made("llama"))
    before = model.eval()(input_ids=IDS).logits
    gradients(model.train())
    assert left_out
    assert torch.equal(model.eval()(input_ids=IDS).logits, before)


class Clamped(LlamaDecoderLayer):
    """As some models do in float16: what is infinite is cut off, and gets no gradient."""

    def forward(self, hidden_states, **given):
        out = super().forward(hidden_states, **given)
        return out.clamp(-6e4, 6e4) if out.dtype == torch.float16 and out.isinf().any() else out


class Scaled(GradientCheckpointingLayer):
    def forward(self, hidden_states):
        return hidden_states + 0.5 * self.mlp(hidden_states)


class Twice(Scaled):
    def forward(self, hidden_states):
        return hidden_states * self.mlp(hidden_states)


def test_the_trial_of_a_block():
    config = made("llama").config
    blocks = {kind: kind(config, 0) for kind in (LlamaDecoderLayer, Clamped)} | {k: k() for k in (Scaled, Twice)}
    for kind in (Scaled, Twice):
        blocks[kind].mlp = nn.Identity()
    found = {kind.__name__: only_adds_mlp(block) for kind, block in blocks.items()}
    assert found == {"LlamaDecoderLayer": True, "Clamped": False, "Scaled": True, "Twice": False}
    assert not only_adds_mlp(nn.Sequential()), "it has no MLP"
