"""The weight of the balance loss goes into the config of a model, under the name that the model has for it."""

import pytest
from transformers import AutoConfig

from luthier.config.load import load_train
from luthier.core.errors import ConfigError, ModelError
from luthier.model.features.router_balance import coefficient_field, set_router_loss

RUN = {"model_name_or_path": "x", "dataset": "x", "output_dir": "x"}


@pytest.mark.parametrize(("kind", "field"), [("gpt_oss", "router_aux_loss_coef"), ("jetmoe", "aux_loss_coef")])
def test_the_weight_is_written_into_the_config(kind, field):
    config = AutoConfig.for_model(kind)
    assert coefficient_field(config) == field
    set_router_loss(config, 0.25)
    assert getattr(config, field) == 0.25


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_models_without_a_balance_loss_say_so(kind):
    with pytest.raises(ModelError, match=f"models of the type {kind} have no router balance loss -> leave"):
        set_router_loss(AutoConfig.for_model(kind), 0.1)


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="moe_aux_loss_coef"):
        load_train({**RUN, "moe_aux_loss_coef": -1})
