"""`use_kt`: every rule, what KTransformers' own classes are told, and the errors where they or a GPU are not there.

Its packages replace transformers and accelerate and need a GPU, so they are not run here.
"""

import types
from dataclasses import replace

import pytest

from luthier.config.keys.ktransformers import PACKAGES
from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ConfigError, MissingExtra, ModelError
from luthier.core.machine import detect
from luthier.model.backends import ktransformers
from luthier.training.arguments import training_arguments

BASE = {"model_name_or_path": "x", "dataset": "x", "output_dir": "x", "do_train": True, "use_kt": True}


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("luthier.config.keys.ktransformers.library_version", lambda distribution: "1.0")


def problems(**keys):
    try:
        load_train({**BASE, **keys})
    except ConfigError as error:
        return {problem.key: str(problem) for problem in error.problems}
    return {}


class TestRules:
    def test_without_the_packages(self):
        text = problems()["use_kt"]
        assert all(name in text for name in PACKAGES)
        assert "environment of their own" in text and "docs/models.md" in text

    def test_nothing_is_wrong_with_a_plain_run(self, installed):
        assert problems() == {}
        assert problems(finetuning_type="full", disable_gradient_checkpointing=True) == {}

    @pytest.mark.parametrize(
        ("keys", "blamed"),
        [
            ({"use_kt": False, "kt_cpu_activation": "retain"}, "kt_cpu_activation"),
            ({"kt_cpu_activation": "forget"}, "kt_cpu_activation"),
            ({"kt_cpu_activation": "recompute", "disable_gradient_checkpointing": True}, "kt_cpu_activation"),
            ({"use_unsloth": True}, "use_unsloth"),
            ({"use_unsloth_gc": True}, "use_unsloth_gc"),
            ({"gradient_checkpointing": True}, "gradient_checkpointing"),
            ({"fsdp": "full_shard", "fsdp_config": {"activation_checkpointing": True}}, "fsdp_config"),
            ({"finetuning_type": "freeze"}, "finetuning_type"),
            ({"finetuning_type": "oft"}, "finetuning_type"),
            ({"adapter_name_or_path": "org/adapter"}, "adapter_name_or_path"),
            ({"kt_config": {"kt_lora_rank": 4}}, "kt_config"),
            ({"kt_weight_path": "a", "kt_config": {"kt_weight_path": "b"}}, "kt_config"),
            ({"kt_config": {"kt_activation_policy": {"cpu": "retain", "gpu": "retain"}}}, "kt_config"),
            ({"stage": "ppo", "reward_model": "a", "reward_model_type": "lora"}, "reward_model_type"),
            ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "use_kt"),
            ({"use_galore": True, "finetuning_type": "full"}, "use_kt"),
            ({"train_from_scratch": True}, "train_from_scratch"),
            ({"quantization_bit": 4}, "quantization_bit"),
        ],
        ids=str,
    )
    def test_what_it_does_not_go_with(self, installed, keys, blamed):
        text = problems(**keys)[blamed]
        assert blamed not in ("use_unsloth", "use_unsloth_gc") or "KTransformers both decide" in text

    def test_one_adapter_in_a_folder_of_this_machine(self, installed, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        (first / "inner").mkdir(parents=True), second.mkdir()
        assert "adapter_name_or_path" not in problems(adapter_name_or_path=str(first))
        assert "adapter_name_or_path" in problems(adapter_name_or_path=f"{first},{second}")
        assert "adapter_folder" not in problems(adapter_name_or_path=str(first), adapter_folder="inner")
        assert "leads out" in problems(adapter_name_or_path=str(first), adapter_folder="../second")["adapter_folder"]
        (first / "link").symlink_to(second)
        assert "leads out" in problems(adapter_name_or_path=str(first), adapter_folder="link")["adapter_folder"]

    def test_settings_that_agree_are_no_conflict(self, installed):
        assert problems(kt_config={"kt_lora_rank": 8, "kt_num_threads": 4}) == {}

    @pytest.mark.parametrize(("load", "more"), [(load_infer, {}), (load_export, {"export_dir": "e"})])
    def test_it_is_for_training(self, installed, load, more):
        with pytest.raises(ConfigError, match="use_kt: true: is for training"):
            load({"model_name_or_path": "x", "use_kt": True, **more})

    def test_its_keys_are_told_apart_from_others(self, installed):
        warnings = load_train({**BASE, "use_kt": False, "kt_weight_path": "w"}).warnings
        assert any(warning.key == "kt_weight_path" and "only by use_kt: true" in warning.reason for warning in warnings)

    def test_the_variable_does_not_stop_a_run(self, installed, monkeypatch):
        monkeypatch.setenv("USE_KT", "1")
        assert problems() == {}


class TestSettings:
    def test_lora(self, installed):
        keys = {"lora_rank": 4, "lora_dropout": 0.5, "kt_weight_path": "w", "kt_config": {"kt_num_threads": 3}}
        keys |= {"cutoff_len": 100, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 2}
        assert ktransformers.settings_for(load_train({**BASE, **keys})) == {
            "enabled": True,
            "kt_num_threads": 3,
            "kt_weight_path": "w",
            "kt_train_mode": "lora",
            "kt_activation_policy": {"cpu": "recompute", "gpu": "recompute"},
            "kt_lora_rank": 4,
            "kt_lora_alpha": 8.0,
            "kt_lora_dropout": 0.5,
            "kt_model_max_length": 2 * 3 * 104,
        }

    def test_full(self, installed):
        keys = {"finetuning_type": "full", "disable_gradient_checkpointing": True, "kt_use_lora_experts": True}
        keys |= {"kt_config": {"kt_model_max_length": 5}, "kt_lora_expert_num": 2}
        settings = ktransformers.settings_for(load_train({**BASE, **keys}))
        assert settings["kt_activation_policy"] == {"cpu": "retain", "gpu": "retain"}
        assert settings["kt_train_mode"] == "full" and settings["kt_model_max_length"] == 5
        assert settings["kt_use_lora_experts"] is True and settings["kt_lora_expert_num"] == 2
        assert not any(name.startswith("kt_lora_r") for name in settings)

    def test_the_arguments_are_told_with_the_adapter(self, installed, tmp_path, monkeypatch):
        (tmp_path / "a" / "b").mkdir(parents=True)
        run = load_train({**BASE, "adapter_name_or_path": str(tmp_path / "a"), "adapter_folder": "b"})
        told = []
        args = types.SimpleNamespace(update_kt_config=lambda config, **how: told.append((config, how)))
        ktransformers.switch_on(args, run, replace(detect(), device="cuda"))
        assert told == [(ktransformers.settings_for(run), {"adapter_name_or_path": str(tmp_path / "a" / "b")})]


class TestHere:
    def test_without_a_gpu(self, installed):
        with pytest.raises(ModelError, match="use_kt: everything but the experts is computed on an NVIDIA GPU"):
            training_arguments(load_train(BASE), replace(detect(), device="cpu"))

    def test_without_the_packages(self):
        with pytest.raises(MissingExtra, match="use_kt needs kt-kernel, transformers-kt, accelerate-kt, which are not"):
            ktransformers.require_here(replace(detect(), device="cuda"))
