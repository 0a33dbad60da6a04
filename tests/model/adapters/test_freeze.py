"""Freeze: which layers and modules are trained."""

import pytest

from luthier.core.errors import ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.adapters.freeze import FreezeConfig, layers_to_train
from tests.model.adapters.test_lora import build


def freeze(model, **config):
    return ADAPTERS.get("freeze").apply(model, FreezeConfig(**config), given=GivenAdapters(), pure_bf16=False)


def learning(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_freeze_trains_the_last_or_the_first_layers():
    model = build(num_hidden_layers=4)
    last = learning(freeze(model, freeze_trainable_layers=1))
    assert last == {name for name, _ in model.named_parameters() if ".layers.3." in name}
    first = learning(freeze(model, freeze_trainable_layers=-2))
    assert first == {n for n, _ in model.named_parameters() if ".layers.0." in n or ".layers.1." in n}


def test_freeze_trains_named_modules_inside_and_outside_the_layers():
    model = freeze(
        build(), freeze_trainable_layers=1, freeze_trainable_modules=("mlp",), freeze_extra_modules=("lm_head", "norm")
    )
    mlp = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert learning(model) == mlp | {"lm_head.weight", "model.norm.weight"}


def test_freeze_finds_layers_by_structure():
    assert learning(freeze(build("gpt2"), freeze_trainable_layers=1)) == {
        name for name, _ in build("gpt2").named_parameters() if ".h.1." in name
    }


@pytest.mark.parametrize("key", ["freeze_trainable_modules", "freeze_extra_modules"])
def test_freeze_lists_the_names_it_knows(key):
    with pytest.raises(ModelError) as caught:
        freeze(build(), **{key: ("mlpp",)})
    assert key in str(caught.value)
    assert ("mlp" if key == "freeze_trainable_modules" else "embed_tokens") in str(caught.value)


def test_more_layers_than_there_are_is_all_of_them():
    assert list(layers_to_train(2, 5)) == [0, 1]
    assert list(layers_to_train(2, -5)) == [0, 1]
