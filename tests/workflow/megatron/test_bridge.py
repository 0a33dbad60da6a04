"""Runs by Megatron-Bridge: what they train, where they continue, and the folder they leave (tests/bridge_library.py
stands in for the library). What the library itself computes has not been run."""

import json
import sys
from pathlib import Path

import pytest
import torch

import luthier
from luthier.config.load import load_train, read_source
from luthier.core.errors import ConfigError, MissingExtra, ModelError, OutputError
from luthier.workflow.megatron.bridge import INSTALL, checkpoints_to_continue
from luthier.workflow.plan.shape import unplanned_reason
from luthier.workflow.preflight import load_checked
from tests import bridge_library
from tests.small_world import losses, small_world


@pytest.fixture
def bridge(monkeypatch):
    monkeypatch.setenv("USE_MEGATRON_BRIDGE", "1")


@pytest.fixture
def library(bridge, monkeypatch):
    for name, module in bridge_library.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("a world"))
    return {**values, "max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "val_size": 4}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def difference(first: Path, second: Path) -> float:
    found, wanted = weights(first), weights(second)
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


def test_losses_and_weights_are_those_of_an_ordinary_run_also_when_continued(library, world, tmp_path, monkeypatch):
    keys = {**world, "do_eval": True, "eval_strategy": "steps", "eval_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": False}
    done = luthier.train({**keys, **saving, "output_dir": str(tmp_path / "bridge")})
    half = {**keys, **saving, "output_dir": str(tmp_path / "half")}
    luthier.train({**half, "max_steps": 2})
    continued = luthier.train(half)
    monkeypatch.delenv("USE_MEGATRON_BRIDGE")
    wanted = luthier.train({**keys, "output_dir": str(tmp_path / "usual")})
    assert losses(done) == pytest.approx(losses(wanted), abs=1e-5)
    assert losses(continued) == pytest.approx(losses(wanted)[2:], abs=1e-5)
    assert difference(tmp_path / "bridge", tmp_path / "usual") < 1e-5
    assert difference(tmp_path / "half", tmp_path / "usual") < 1e-5
    folder = tmp_path / "bridge"
    found = json.loads((folder / "eval_results.json").read_text())["eval_loss"]
    assert found == pytest.approx(json.loads((tmp_path / "usual" / "eval_results.json").read_text())["eval_loss"], 1e-5)
    assert [logs["step"] for logs in done.log_history if "eval_loss" in logs] == [2, 3]
    assert (folder / "checkpoint-megatron" / "latest_train_state.pt").exists()
    names = {"run.yaml", "manifest.json", "data_report.json", "train_results.json", "trainer_log.jsonl", "README.md"}
    assert names | {"tokenizer.json", "trainer_state.json"} <= {path.name for path in folder.iterdir()}


def test_an_adapter_is_saved_in_the_format_of_peft(library, world, tmp_path):
    keys = {"finetuning_type": "lora", "lora_rank": 4, "learning_rate": 1e-2, "output_dir": str(tmp_path)}
    result = luthier.train({**world, **keys, "val_size": 0, "gradient_accumulation_steps": 2})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == world["model_name_or_path"]
    assert losses(result)[-1] < losses(result)[0]
    assert not (tmp_path / "checkpoint-megatron").exists() and not list(tmp_path.glob("model*.safetensors"))


def test_a_missing_library_is_said_in_one_sentence(bridge, world, tmp_path):
    with pytest.raises(MissingExtra, match=r"Megatron-Bridge cannot be imported here .* -> pip install .*megatron-bri"):
        luthier.train({**world, "output_dir": str(tmp_path)})


def test_a_library_that_is_too_old_is_said(library, world, tmp_path, monkeypatch):
    config = sys.modules["megatron.bridge.training.config"]
    monkeypatch.setattr(config, "CheckpointConfig", type("CheckpointConfig", (), {}))
    with pytest.raises(MissingExtra, match=r"cannot start from a folder of Hugging Face -> pip install"):
        luthier.train({**world, "output_dir": str(tmp_path)})


def test_a_model_that_it_does_not_know_is_named(library, world, tmp_path, monkeypatch):
    def refuse(path, **options):
        raise ValueError("the architecture is not supported")

    monkeypatch.setattr(bridge_library.AutoBridge, "from_hf_pretrained", refuse)
    with pytest.raises(ModelError, match=r"model: Megatron-Bridge cannot read it \(the architecture is not supp"):
        luthier.train({**world, "output_dir": str(tmp_path)})


def test_keys_are_checked_without_the_library(bridge, world):
    keys = read_source({**world, "sequence_parallel": True, "moe_token_dispatcher_type": "any"})
    with pytest.raises(ConfigError) as raised:
        load_checked("train", keys, begins=True)
    problems = {problem.key: problem for problem in raised.value.problems}
    assert problems.keys() == {"USE_MEGATRON_BRIDGE", "sequence_parallel", "moe_token_dispatcher_type"}
    assert problems["USE_MEGATRON_BRIDGE"].remedy == INSTALL
    run = load_checked("train", read_source(world), begins=False)
    assert [warning.key for warning in run.warnings] == ["USE_MEGATRON_BRIDGE"], "it may be on the machine that trains"


def test_its_memory_is_not_planned(bridge, world):
    assert unplanned_reason(load_train(world)) == "another library loads and trains the model"


def test_the_checkpoints_to_continue(bridge, world, tmp_path):
    def point(**keys):
        run = load_train({**world, "overwrite_output_dir": False, "output_dir": str(tmp_path), **keys})
        return checkpoints_to_continue(run)

    assert point() is None
    own = tmp_path / "checkpoint-megatron"
    own.mkdir()
    assert point() is None
    (own / "latest_checkpointed_iteration.txt").write_text("2")
    assert point() == str(own)
    assert point(resume_from_checkpoint="another") == "another"
    with pytest.raises(OutputError, match=r"overwrite_output_dir: .*megatron holds the checkpoints of an earlier run"):
        point(overwrite_output_dir=True)
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "model.safetensors").touch()
    with pytest.raises(OutputError, match="finished"):
        point(output_dir=str(finished))
