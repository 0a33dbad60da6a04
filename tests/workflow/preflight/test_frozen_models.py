"""Models beside the policy, looked at before anything is loaded: their adapters, and files of reward functions."""

import json

import pytest

from luthier.config.load import load_train
from luthier.workflow.preflight.frozen_models import frozen_model_problems
from tests.tiny import tiny_llama


@pytest.fixture
def base(tmp_path):
    return tiny_llama(tmp_path / "base")


def adapter(folder, **config):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    (folder / "adapter_model.bin").touch()
    return folder


def problems(base, **keys) -> list[str]:
    common = {"model_name_or_path": str(base), "output_dir": "o", "dataset": "d", "do_train": True}
    return [f"{one.key}: {one.reason}" for one in frozen_model_problems(load_train({**common, **keys}))]


def test_adapters_of_a_reference_are_looked_for_in_adapter_folder(base, tmp_path):
    """That is where they are loaded from."""
    adapter(tmp_path / "outer" / "inner")
    keys = {"stage": "dpo", "ref_model": str(base), "ref_model_adapters": str(tmp_path / "outer")}
    assert problems(base, **keys, adapter_folder="inner") == []
    (found,) = problems(base, **keys)
    assert found.startswith("ref_model_adapters: this folder holds no adapter")


def test_an_adapter_as_reward_model_is_looked_for_in_adapter_folder(base, tmp_path):
    keys = {"stage": "ppo", "reward_model_type": "lora", "adapter_folder": "inner", "finetuning_type": "lora"}
    adapter(tmp_path / "scores" / "inner", task_type="SEQ_CLS")
    adapter(tmp_path / "writes" / "inner", task_type="CAUSAL_LM")
    assert problems(base, **keys, reward_model=str(tmp_path / "scores")) == []
    (found,) = problems(base, **keys, reward_model=str(tmp_path / "writes"))
    assert found.startswith("reward_model: this adapter has no reward head")


@pytest.mark.parametrize("text", ["def f(:", "\0", "(" * 10_000])
def test_a_file_of_reward_functions_that_is_not_python_is_told(base, tmp_path, text):
    file = tmp_path / "rewards.py"
    file.write_text(text)
    (found,) = problems(base, stage="grpo", reward_funcs=f"{file}:score")
    assert "is not Python" in found
