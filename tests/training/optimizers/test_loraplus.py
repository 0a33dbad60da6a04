"""LoRA+: the groups are those of peft, and the learning rate of B is multiplied by the factor."""

from collections import Counter
from typing import Any

import peft
import peft.optimizers
import pytest
import torch

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.training.optimizers.loraplus import kind_of
from tests.training.optimizers.worlds import arguments, built, tiny_model

RUN = {"model_name_or_path": "m", "dataset": "d", "template": "chatml", "output_dir": "o", "do_train": True}


def adapted(**keys: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"], "bias": "none"}
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(**{**settings, **keys}))


def rates_by_name(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    of_weight = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    return {name: of_weight[id(weight)] for name, weight in model.named_parameters() if weight.requires_grad}


def test_every_weight_has_the_learning_rate_that_peft_gives_it(tmp_path):
    model = adapted()
    args = arguments(tmp_path, weight_decay=0.1)
    ours = built("loraplus", model, args, loraplus_lr_ratio=16.0, loraplus_lr_embedding=1e-5)
    theirs = peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=args.learning_rate, loraplus_lr_ratio=16.0, loraplus_lr_embedding=1e-5
    )
    expected = rates_by_name(model, theirs)
    assert rates_by_name(model, ours) == expected
    assert Counter(expected.values()).keys() == {1e-2, 16e-2, 1e-5}


def test_a_flattened_weight_is_known_by_its_name():
    flat = torch.nn.Parameter(torch.zeros(4))
    names = ("q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight", "embed_tokens.lora_embedding_A.default")
    assert [kind_of(name, flat) for name in names] == ["A", "B", "embedding"]


def test_weight_decay_spares_norms(tmp_path):
    optimizer = built("loraplus", adapted(), arguments(tmp_path, weight_decay=0.1), loraplus_lr_ratio=2.0)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim == 2 else 0.0)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"finetuning_type": "full"}, "loraplus_lr_ratio: 16: is about the two matrices of LoRA"),
        ({"loraplus_lr_ratio": -2}, "loraplus_lr_ratio: -2: must be above 0"),
        ({"loraplus_lr_embedding": -1}, "loraplus_lr_embedding: -1: must be at least 0"),
        ({"use_muon": True}, "use_muon: true: another optimizer is switched on too"),
    ],
)
def test_incompatible_keys_are_refused(keys, text):
    with pytest.raises(ConfigError) as caught:
        load_train({**RUN, "loraplus_lr_ratio": 16, **keys})
    assert text in str(caught.value)


def test_weights_may_be_sharded():
    run = load_train({**RUN, "loraplus_lr_ratio": 16, "fsdp": "full_shard"})
    assert run.optimizers["loraplus"].loraplus_lr_ratio == 16
