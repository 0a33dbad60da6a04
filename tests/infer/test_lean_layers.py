"""Layers of a model that answers during training: the same numbers, and afterwards the layers of training."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from luthier.infer.lean_layers import lean_layers
from luthier.model.kernels.lora_layers import fuse_lora
from tests.tiny import tiny_llama

IDS = torch.tensor([[5, 6, 7], [8, 9, 10], [1, 2, 3]])


def learning(folder, **keys):
    """A model with adapters whose layers are fused; gate_proj has a bias in the base."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama(folder, mlp_bias=True))
    lora = {"r": 4, "target_modules": ["q_proj", "gate_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**lora | keys))
    fuse_lora(model)
    return model.train()


def own_forwards(model):
    return {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize(
    ("keys", "num_fused", "num_lean"),
    [({}, 4, 4), ({"lora_dropout": 0.5}, 0, 0), ({"use_dora": True}, 4, 0)],
    ids=str,
)
def test_the_logits_are_the_same_and_training_goes_on_as_before(tmp_path, keys, num_fused, num_lean):
    model = learning(tmp_path, **keys)
    before = own_forwards(model)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with lean_layers(model):
            during = own_forwards(model)
            assert len(before) == num_fused
            assert sum(during[name] is not one for name, one in before.items()) == num_lean
            assert len(during) == len(before)
            found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert own_forwards(model.train()) == before
    model(input_ids=IDS).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_the_layers_of_training_come_back_after_an_error(tmp_path):
    model = learning(tmp_path)
    before = own_forwards(model)
    with pytest.raises(KeyError), lean_layers(model.eval()):
        raise KeyError
    assert own_forwards(model) == before


def test_autocast_decides_the_number_format_as_in_training(tmp_path):
    model = learning(tmp_path).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 1, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        with lean_layers(model):
            found = layer(x)
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)
