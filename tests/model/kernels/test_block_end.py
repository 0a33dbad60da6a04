"""A block that is computed again leaves out its last product where no gradient depends on it, and nowhere else."""

import copy

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.adapters.lora import LoraConfig
from luthier.model.kernels import block_end, fuse
from luthier.model.kernels.block_end import only_adds_mlp
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
    monkeypatch.setattr(fuse, "_gated_mlp_unread", lambda *args: calls.append(args[0]) or original(*args))
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
def test_gradients_are_the_same_to_the_bit(name, learns, left_out):
    model = made(name, learns)
    other = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_end, "only_adds_mlp", lambda *_: False)
        expected = gradients(checkpointed(other))
    assert not left_out
    found = gradients(checkpointed(model))
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


def test_hooks_and_the_way_that_is_not_reentrant_compute_all(left_out):
    model = checkpointed(made("llama"), use_reentrant=False)
    gradients(model)
    model = checkpointed(made("llama"))
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    gradients(model)
    assert not left_out


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
