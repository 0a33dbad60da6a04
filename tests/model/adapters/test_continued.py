"""What a run file says of an adapter that has its own settings: a warning with both values, and nothing else."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from luthier.config.load import read_source
from luthier.core.errors import ConfigError
from luthier.model.adapters import _merge
from luthier.model.adapters._continued import COUNTERPARTS
from luthier.model.adapters.lora import LoraConfig
from luthier.model.adapters.oft import OftConfig
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.workflow.preflight import load_checked
from luthier.workflow.training import train
from tests.small_world import small_world

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.25, "target_modules": ["q_proj", "v_proj"]}
OFT = {"r": 0, "oft_block_size": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    keys = small_world(tmp_path_factory.mktemp("continued"))
    root = Path(keys["output_dir"]).parent
    for name, settings in {
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
        "oft": peft.OFTConfig(task_type="CAUSAL_LM", **OFT),
        "loha": peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
        "whole": peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    }.items():
        model = load_model(ModelSource(keys["model_name_or_path"]), dtype=torch.float32)
        peft.get_peft_model(model, settings).save_pretrained(root / name)
    return {**keys, "finetuning_type": "lora", "max_steps": 1, "report_to": "none"}


def adapter(world: dict[str, Any], name: str) -> str:
    return str(Path(world["output_dir"]).parent / name)


def warned(world: dict[str, Any], name: str, **keys: Any) -> list[str]:
    """What a run that trains the adapter `name` further is warned of."""
    run = load_checked(
        "train", read_source({**world, "adapter_name_or_path": adapter(world, name), **keys}), begins=True
    )
    return [str(problem) for problem in run.warnings]


@pytest.mark.parametrize(
    ("key", "value", "own"),
    [
        ("lora_rank", 16, "r: 8"),
        ("lora_alpha", 32, "lora_alpha: 16"),
        ("lora_dropout", 0.1, "lora_dropout: 0.25"),
        ("lora_target", "q_proj,k_proj", "target_modules: q_proj,v_proj"),
        ("additional_target", "lm_head", "modules_to_save: null"),
        ("use_rslora", True, "use_rslora: false"),
        ("use_dora", True, "use_dora: false"),
    ],
)
def test_another_value_is_a_warning_that_names_both(world, key, value, own):
    (line,) = warned(world, "lora", **{key: value})
    shown = {True: "true", "q_proj,k_proj": "'k_proj,q_proj'", "lm_head": "'lm_head'"}.get(value, value)
    assert f"{key}: {shown}: is not read, since adapter {adapter(world, 'lora')} was made with {own}," in line
    assert line.endswith("create_new_adapter: true, which merges that adapter and starts a new one")


@pytest.mark.parametrize(
    ("key", "value", "own"),
    [
        ("oft_block_size", 32, "oft_block_size: 16"),
        ("module_dropout", 0.5, "module_dropout: 0.0"),
        ("oft_target", "k_proj", "target_modules: q_proj,v_proj"),
        ("lora_target", "k_proj", "target_modules: q_proj,v_proj"),
    ],
)
def test_of_oft_too(world, key, value, own):
    lines = warned(world, "oft", finetuning_type="oft", **{key: value})
    assert any(f"{key}: {value!r}: is not read" in line and own in line for line in lines)


def test_the_same_value_and_one_that_nobody_wrote_are_no_warning(world):
    same = {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.25, "lora_target": "v_proj,q_proj", "use_dora": False}
    assert warned(world, "lora", **same) == []
    assert warned(world, "lora") == []
    assert warned(world, "lora", lora_rank=4, create_new_adapter=True) == []
    assert warned(world, "lora", lora_rank=4, do_train=False, do_eval=True, val_size=4) == []


@pytest.mark.parametrize(("name", "method"), [("oft", "OFT"), ("loha", "LOHA")])
def test_an_adapter_of_another_method_is_trained_further_as_such_and_that_is_said(world, name, method):
    lines = warned(world, name, lora_rank=8, lora_alpha=4)
    assert any(
        f"finetuning_type: 'lora': is not read, since adapter {adapter(world, name)} is of {method}" in line
        for line in lines
    )
    assert any("lora_alpha: 4: is not read" in line for line in lines)


def test_all_is_compared_with_the_layers_that_the_adapter_is_on(world, tmp_path, said):
    keys = {**world, "lora_target": "all", "output_dir": str(tmp_path / "out")}
    for name in ("whole", "lora"):
        run = load_checked("train", read_source({**keys, "adapter_name_or_path": adapter(world, name)}), begins=True)
        assert not run.warnings
        train(run)
        told = [line for line in said if "lora_target" in line]
        assert bool(told) == (name == "lora")
    assert "is on other layers (q_proj,v_proj), and stays there" in told[0]


def test_of_an_adapter_of_a_hub_it_is_said_once_it_is_here(world, tmp_path, said, monkeypatch):
    folder = Path(adapter(world, "lora"))
    monkeypatch.setattr(_merge, "adapter_path", lambda name, given: folder)
    model = load_model(ModelSource(world["model_name_or_path"]), dtype=torch.float32)
    given = _merge.GivenAdapters(("org/adapter",), written={"lora_rank": 16})
    _merge.continue_adapter(model, given, pure_bf16=False)
    assert any("lora_rank: 16: is not read, since adapter org/adapter was made with r: 8" in line for line in said)


def test_a_damaged_config_is_reported_as_such(world, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="this is not valid JSON"):
        load_checked(
            "train", read_source({**world, "adapter_name_or_path": str(tmp_path), "lora_rank": 4}), begins=True
        )


def test_every_setting_of_a_new_adapter_has_its_counterpart_or_its_rule():
    """A key that is added to a method is compared too, or has a warning of its own."""
    own = {"pissa_init", "pissa_iter", "pissa_convert", "loftq_init", "use_llama_pro", "freeze_trainable_layers"}
    keys = {*LoraConfig.__dataclass_fields__, *OftConfig.__dataclass_fields__}
    assert keys - own - {"create_new_adapter"} == set(COUNTERPARTS)
    peft_names = {*peft.LoraConfig.__dataclass_fields__, *peft.OFTConfig.__dataclass_fields__}
    assert set(COUNTERPARTS.values()) <= peft_names
