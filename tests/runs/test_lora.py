"""LoRA runs: trained modules, parameter counts, adapters that are trained further, merged or followed by new ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ModelError
from luthier.model.backends import load_for_training
from luthier.workflow.text import load_text_side
from tests.small_world import losses, small_world

SHAPES = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
}
"""(out, in) of each linear layer in each of the two blocks of the tiny Llama."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), "finetuning_type": "lora", "max_steps": 3}


@pytest.fixture(scope="module")
def first_adapter(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "adapter"
    luthier.train({**world, "output_dir": str(folder)})
    return folder


@pytest.fixture(scope="module")
def second_adapter(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("second") / "adapter"
    luthier.train(
        {**world, "output_dir": str(folder), "dataset": "tools", "cutoff_len": 200, "lora_rank": 4, "seed": 7}
    )
    return folder


@pytest.mark.parametrize(
    ("target", "rank", "names"),
    [
        ("all", 8, tuple(SHAPES)),
        ("q_proj,v_proj", 4, ("q_proj", "v_proj")),
        ("down_proj", 1, ("down_proj",)),
    ],
)
def test_only_the_named_modules_are_trained(values, target, rank, names):
    luthier.train({**values, "lora_target": target, "lora_rank": rank})
    saved = load_file(Path(values["output_dir"], "adapter_model.safetensors"))
    assert {name.split(".")[-3] for name in saved} == set(names)
    expected = 2 * sum(rank * (rows + columns) for rows, columns in (SHAPES[name] for name in names))
    assert sum(weight.numel() for weight in saved.values()) == expected
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    run = load_train({**values, "lora_target": target, "lora_rank": rank})
    loaded = load_for_training(run, load_text_side(run).fitted)
    assert loaded.num_trainable == expected
    assert loaded.num_parameters == expected + sum(w.numel() for w in base_model(values).parameters())


def base_model(values: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(values["model_name_or_path"], dtype=torch.float32).eval()


@pytest.mark.parametrize(("alpha", "saved"), [(None, 16), (24, 24)])
def test_alpha_is_twice_the_rank_unless_given(values, alpha, saved):
    luthier.train({**values, "max_steps": 1, "lora_alpha": alpha})
    config = json.loads(Path(values["output_dir"], "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, saved)
    assert config["base_model_name_or_path"] == values["model_name_or_path"]


def test_an_unknown_target_is_named(values):
    with pytest.raises(ModelError, match=r"lora_target.*'q_prj'.*did you mean 'q_proj'"):
        luthier.train({**values, "lora_target": "q_prj"})


def logits_of(values: dict[str, Any], *adapters: Path) -> torch.Tensor:
    """Base and adapters through plain peft, one merged after the other."""
    from peft import PeftModel

    model = base_model(values)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def test_an_adapter_is_trained_further(values, first_adapter, capsys):
    """Where it stopped: the first loss is that of base and adapter, and rank and targets stay those of the adapter."""
    keys = {"adapter_name_or_path": str(first_adapter), "lora_rank": 2, "dataset": "numbers"}
    result = luthier.train({**values, **keys})
    assert "is trained further as it is (LORA, r 8, lora_alpha 16)" in capsys.readouterr().err
    start = luthier.train({**values, "max_steps": 1, "output_dir": values["output_dir"] + "-fresh"})
    assert losses(result)[0] < losses(start)[0] - 0.1
    assert json.loads(Path(values["output_dir"], "adapter_config.json").read_text())["r"] == 8
    assert not torch.equal(logits_of(values, Path(values["output_dir"])), logits_of(values, first_adapter))


def test_a_learning_rate_of_zero_leaves_an_adapter_as_it_was(values, first_adapter):
    luthier.train({**values, "adapter_name_or_path": str(first_adapter), "learning_rate": 0.0, "max_steps": 1})
    before, after = (load_file(Path(f, "adapter_model.safetensors")) for f in (first_adapter, values["output_dir"]))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_new_adapter_starts_on_top_of_merged_ones(values, first_adapter, second_adapter):
    keys = {"adapter_name_or_path": f"{first_adapter},{second_adapter}", "create_new_adapter": True, "lora_rank": 2}
    luthier.train({**values, **keys, "max_steps": 1, "learning_rate": 0.0})
    config = json.loads(Path(values["output_dir"], "adapter_config.json").read_text())
    assert config["r"] == 2
    # B is still 0, so base, both adapters and the new one together are base and both adapters.
    together = logits_of(values, first_adapter, second_adapter, Path(values["output_dir"]))
    assert (together - logits_of(values, first_adapter, second_adapter)).abs().max() == 0


def test_of_several_adapters_the_last_is_trained(values, first_adapter, second_adapter):
    keys = {"adapter_name_or_path": f"{first_adapter},{second_adapter}", "learning_rate": 0.0, "max_steps": 1}
    result = luthier.train({**values, **keys})
    saved = load_file(Path(values["output_dir"], "adapter_model.safetensors"))
    given = load_file(second_adapter / "adapter_model.safetensors")
    assert saved.keys() == given.keys() and all(torch.equal(saved[name], given[name]) for name in saved)
    together = luthier.train({**values, **keys, "create_new_adapter": True})
    assert losses(result) == pytest.approx(losses(together), abs=1e-5)


@pytest.mark.parametrize("key", ["use_rslora", "use_dora"])
def test_variants_of_lora_train_and_load_again(values, key):
    result = luthier.train({**values, key: True})
    assert losses(result)[-1] < losses(result)[0]
    assert json.loads(Path(values["output_dir"], "adapter_config.json").read_text())[key]
    assert torch.isfinite(logits_of(values, Path(values["output_dir"]))).all()


def test_additional_modules_are_trained_and_saved_with_the_adapter(values):
    luthier.train({**values, "additional_target": "embed_tokens,lm_head"})
    saved = load_file(Path(values["output_dir"], "adapter_model.safetensors"))
    base = base_model(values)
    for name, weight in (("embed_tokens", base.get_input_embeddings()), ("lm_head", base.get_output_embeddings())):
        (trained,) = [value for key, value in saved.items() if name in key]
        assert trained.shape == weight.weight.shape and not torch.equal(trained, weight.weight)


def test_a_pissa_run_leaves_a_plain_adapter_of_the_original_model(values):
    """Continued by luthier, loaded by peft: both start from the same; and scripts find it where they look for it."""
    result = luthier.train({**values, "pissa_init": True, "pissa_convert": True, "lora_rank": 4})
    assert losses(result)[-1] < losses(result)[0]
    folder = Path(values["output_dir"])
    again = load_file(folder / "pissa_converted" / "adapter_model.safetensors")
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    assert torch.isfinite(logits_of(values, folder)).all()
    keys = {"adapter_name_or_path": str(folder), "learning_rate": 0.0, "max_steps": 1}
    more = luthier.train({**values, **keys, "output_dir": values["output_dir"] + "-more"})
    assert losses(more)[0] < losses(result)[0]
