"""A mixture of depths from a dense model to an answer: trained, stopped, resumed, adapted, exported, prompted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.config.load import load_export, load_train
from luthier.core.errors import ConfigError, ModelError
from tests.small_world import losses, small_world

GREEDY = {"template": "chatml", "do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return small_world(tmp_path_factory.mktemp("depths"), num_hidden_layers=4) | {"seed": 1, "max_steps": 12}


@pytest.fixture(scope="module")
def routed(world) -> tuple[Path, Any]:
    """The folder of a converted model after twelve steps, and the result of the run."""
    result = luthier.train(world | {"mixture_of_depths": "convert"})
    return Path(world["output_dir"]), result


def test_a_converted_model_is_trained_and_saved_as_routed(routed):
    folder, result = routed
    values = losses(result)
    assert values[-1] < 0.8 * values[0]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["model_type"] == "luthier_mixture_of_depths"
    assert config["mixture_of_depths"] == {"model_type": "llama", "capacity": 0.125}
    weights = load_file(folder / "model.safetensors")
    for index in (1, 3):
        assert int(weights[f"model.layers.{index}.depth_router.num_seen"]) == 12
        assert weights[f"model.layers.{index}.depth_router.weight"].shape == (64,)


def test_a_resumed_run_equals_an_uninterrupted_one(world, routed, tmp_path):
    keys = world | {"mixture_of_depths": "convert", "output_dir": str(tmp_path), "overwrite_output_dir": False}
    keys |= {"save_strategy": "steps", "save_steps": 6}
    luthier.train(keys | {"max_steps": 6, "lr_scheduler_type": "constant"})
    other = tmp_path / "whole"
    luthier.train(keys | {"lr_scheduler_type": "constant"})
    luthier.train(keys | {"lr_scheduler_type": "constant", "output_dir": str(other)})
    stopped, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path, other))
    assert stopped.keys() == whole.keys() and all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_rows_are_not_padded(world, said, tmp_path):
    luthier.train(world | {"mixture_of_depths": "convert", "output_dir": str(tmp_path), "max_steps": 1})
    assert not any("padded" in line for line in said)


@pytest.mark.parametrize("key", [{}, {"mixture_of_depths": "load"}])
def test_it_answers(routed, key):
    folder, _ = routed
    session = luthier.chat({"model_name_or_path": str(folder), **GREEDY, **key})
    assert session.ask("Say the number 3.")


def test_an_adapter_is_trained_on_top_and_merged(world, routed, tmp_path):
    folder, _ = routed
    keys = {"model_name_or_path": str(folder), "mixture_of_depths": "load", "finetuning_type": "lora"}
    result = luthier.train(world | keys | {"output_dir": str(tmp_path / "lora"), "max_steps": 4})
    assert losses(result)[-1] < losses(result)[0]
    adapted = {**keys, "adapter_name_or_path": str(tmp_path / "lora"), "template": "chatml"}
    merged = luthier.export(adapted | {"export_dir": str(tmp_path / "merged"), "export_check": True})
    assert json.loads((merged / "config.json").read_text("utf-8"))["model_type"] == "luthier_mixture_of_depths"
    answers = {
        luthier.chat({**named, **GREEDY}).ask("Say the number 3.")
        for named in (adapted, {"model_name_or_path": str(merged)})
    }
    assert len(answers) == 1
    with pytest.raises(ModelError, match="export_gguf: a mixture of depths has routers"):
        luthier.export({**adapted, "export_dir": str(tmp_path / "gguf"), "export_gguf": "f16"})


def test_a_dense_model_cannot_be_loaded_as_one(world):
    with pytest.raises(ModelError, match="is a dense model -> set mixture_of_depths: convert"):
        luthier.train(world | {"mixture_of_depths": "load"})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"finetuning_type": "lora"}, "an adapter holds no routers -> set finetuning_type: full"),
        ({"finetuning_type": "freeze"}, "routers must be trained together with the blocks"),
        ({"stage": "dpo"}, "defined for the loss of pt and sft only"),
        (
            {"quantization_bit": 4, "finetuning_type": "lora", "mixture_of_depths": "load"},
            "must be trained, and quantized",
        ),
        ({"shift_attn": True}, "leave one of the two out"),
        ({"flash_attn": "disabled"}, "does not attend across samples, and plain attention does"),
        ({"moe_aux_loss_coef": 0.1}, "counts every token in every block"),
        ({"fsdp": "full_shard"}, "FSDP and ZeRO-3 shard its weights"),
        (
            {"do_train": False, "do_predict": True, "predict_with_generate": True, "val_size": 2},
            "only training convert",
        ),
    ],
)
def test_incompatible_keys_are_refused(world, keys, words):
    with pytest.raises(ConfigError, match=words):
        load_train(world | {"mixture_of_depths": "convert"} | keys)


def test_only_training_converts(world):
    keys = {"model_name_or_path": world["model_name_or_path"], "template": "chatml", "mixture_of_depths": "convert"}
    with pytest.raises(ConfigError, match="so only training converts"):
        load_export(keys | {"export_dir": "x"})
    with pytest.raises(ConfigError, match="so only training converts"):
        luthier.chat(keys)
