"""Features are applied in one order, by one place."""

import dataclasses

import pytest

from luthier.config.load import load_export, load_infer, load_train
from luthier.config.runs import Features
from luthier.core.errors import ConfigError
from luthier.core.kinds import FEATURES
from luthier.core.machine import detect
from luthier.model.features import Purpose
from luthier.model.loading.features import ORDER, change_config, change_model

RUN = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "template": "default"}


def test_every_feature_is_applied_once_and_has_its_place_in_a_run():
    assert sorted(feature.name for feature in ORDER) == list(FEATURES.names)
    assert sorted(field.name for field in dataclasses.fields(Features)) == list(FEATURES.names)


def test_a_run_holds_the_keys_of_each_feature():
    features = load_train({**RUN, "rope_scaling": "yarn", "add_tokens": "a,b"}).features
    assert features.rope_scaling.rope_scaling == "yarn"
    assert features.new_tokens.add_tokens == ("a", "b")
    assert features.new_tokens.may_grow
    assert not features.shifted_attention.shift_attn


def test_without_their_keys_features_change_nothing(llama_folder):
    from transformers import AutoModelForCausalLM

    run = load_train(RUN)
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    before = model.config.to_dict(), {name: type(module) for name, module in model.named_modules()}
    purpose = Purpose(name="m", machine=detect())
    change_config(run, model.config, purpose)
    change_model(run, model, purpose)
    assert before == (model.config.to_dict(), {name: type(module) for name, module in model.named_modules()})


@pytest.mark.parametrize("load", [load_infer, load_export])
def test_only_training_turns_a_model_into_a_mixture_of_depths(load):
    keys = {"model_name_or_path": "m", "mixture_of_depths": "convert"}
    if load is load_export:
        keys["export_dir"] = "o"
    with pytest.raises(ConfigError, match="only training converts"):
        load(keys)


def test_rules_about_training_are_not_checked_elsewhere():
    """A negative weight is an error in training, and not read by a chat."""
    load_infer({"model_name_or_path": "m", "moe_aux_loss_coef": -1})
    with pytest.raises(ConfigError, match="moe_aux_loss_coef: -1: must be at least 0"):
        load_train({**RUN, "moe_aux_loss_coef": -1})
