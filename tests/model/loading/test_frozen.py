"""Frozen models compute as the policy does."""

import pytest
import torch

from luthier.config.load import load_train
from luthier.model.files.sources import model_source
from luthier.model.loading.frozen import load_frozen_model
from luthier.model.tokenizer import FittedTokenizer, load_tokenizer
from tests.small_world import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("fast_path", [True, False])
def test_kernels_are_those_of_the_policy(world, fast_path):
    run = load_train({**world, "output_dir": "o", "fast_path": fast_path})
    source = world["model_name_or_path"]
    fitted = FittedTokenizer(load_tokenizer(model_source(run.model)))
    model = load_frozen_model(run, "ref_model", source, (), fitted)
    norm = model.model.layers[0].input_layernorm
    assert ("forward" in vars(norm)) == fast_path
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    ids = torch.arange(12)[None]
    found = model(ids).logits
    for module in model.modules():
        vars(module).pop("forward", None)
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-4)
