"""LoftQ: the adapter starts as the best low-rank part of what quantisation took away."""

import pytest
import torch

from luthier.config.load import load_infer, load_train
from luthier.core.errors import ConfigError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters.lora import LoraConfig
from luthier.model.load import load_for_inference
from luthier.model.loftq import computed_weight
from luthier.model.merge import GivenAdapters
from tests.model.test_adapters import fresh
from tests.tiny import tiny_llama

pytest.importorskip("bitsandbytes")
BASE = {"model_name_or_path": "m", "dataset": "d", "template": "qwen", "output_dir": "o", "do_train": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def quantised(folder, **keys):
    return load_for_inference(load_infer({"model_name_or_path": str(folder), "quantization_bit": 4, **keys}))


@pytest.mark.parametrize("method", ["bnb", "hqq"])
def test_what_the_adapter_starts_from(folder, method):
    """W - Q - s B A is W - Q without its first r singular values."""
    pytest.importorskip(method if method == "hqq" else "bitsandbytes")
    model = quantised(folder, quantization_method=method)
    config = LoraConfig(loftq_init=True, lora_rank=8, lora_target=("q_proj", "down_proj"))
    adapted = ADAPTERS.get("lora").apply(model, config, given=GivenAdapters(), train_embeddings=False, pure_bf16=False)
    original = fresh(folder)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = adapted.get_base_model().get_submodule(name)
        lost = original.get_submodule(name).weight - computed_weight(layer.base_layer)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        lost, a, b = lost.detach(), a.detach(), b.detach()
        left_over = lost - layer.scaling["default"] * b.float() @ a.float()
        expected = torch.linalg.svdvals(lost)[8:].norm()
        assert left_over.norm() == pytest.approx(float(expected), rel=0.03)
        assert left_over.norm() < 0.9 * lost.norm()


def test_what_a_quantised_layer_computes(folder):
    model, original = quantised(folder), fresh(folder)
    layer = model.model.layers[0].mlp.up_proj
    weight = original.model.layers[0].mlp.up_proj.weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(x @ computed_weight(layer).T, layer(x).float(), atol=1e-3, rtol=1e-3)
    assert 0 < (computed_weight(layer) - weight).abs().max() < weight.abs().max()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "nothing is quantised here"),
        ({"quantization_bit": 4, "use_dora": True}, "changes the direction"),
        ({"quantization_bit": 4, "pissa_init": True}, "quantised weights cannot give"),
    ],
)
def test_rules(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_train({**BASE, "loftq_init": True, **keys})
