"""What LLaMA Board saves becomes a run file that asks for the same."""

import pytest

from luthier.config.key_table import catalog
from luthier.core.errors import InvalidInput
from luthier.webui.document import values_of
from luthier.webui.llamaboard import _table, is_config, run_text

SAVED = {
    "top.model_name": "Qwen3-4B",
    "top.finetuning_type": "lora",
    "top.quantization_bit": "none",
    "train.training_stage": "DPO",
    "train.dataset": ["a", "b"],
    "train.learning_rate": "5e-5",
    "train.num_train_epochs": "3.0",
    "train.compute_type": "bf16",
    "train.use_dora": True,
    "train.report_to": [],
    "train.galore_rank": 16,
    "train.neftune_alpha": 0,
    "train.enable_thinking": True,
    "train.image_max_pixels": "768*768",
    "top.booster": "flashattn2",
}


def given(**elements):
    return values_of(run_text({"top.model_path": "m", **{f"train.{name}": value for name, value in elements.items()}}))


def test_settings_become_keys_and_defaults_of_other_methods_are_left_out():
    text = run_text(SAVED)
    assert text.startswith("model_name_or_path:  # Qwen3-4B\n")
    assert values_of(text) == {
        "model_name_or_path": "",
        "do_train": "true",
        "finetuning_type": "lora",
        "stage": "dpo",
        "dataset": "a,b",
        "learning_rate": "5e-5",
        "num_train_epochs": "3.0",
        "bf16": "true",
        "use_dora": "true",
        "flash_attn": "fa2",
    }


def test_what_is_a_config_of_the_board():
    assert is_config(SAVED) and not is_config({"stage": "sft"}) and not is_config(["top.model_name"])


@pytest.mark.parametrize(
    ("elements", "keys"),
    [
        ({"train_seed": "7"}, {"seed": "7"}),
        ({"report_to": ["wandb", "tensorboard"]}, {"report_to": "wandb,tensorboard"}),
        (
            {"freeze_vision_tower": False, "freeze_language_model": True},
            {"freeze_vision_tower": "false", "freeze_language_model": "true"},
        ),
        ({"freeze_vision_tower": True, "freeze_language_model": False}, {}),
        ({"enable_thinking": False}, {"enable_thinking": "false"}),
        ({"image_max_pixels": "512*512", "video_min_pixels": "16*16"}, {"image_max_pixels": "262144"}),
        ({"use_swanlab": True, "swanlab_project": "p"}, {"use_swanlab": "true", "swanlab_project": "p"}),
        ({"swanlab_project": "p"}, {}),
        ({"ds_stage": "3", "ds_offload": True}, {"deepspeed": "llamaboard_cache/ds_z3_offload_config.json"}),
        ({"ds_stage": "none", "ds_offload": True}, {}),
        ({"training_stage": "PPO"}, {"stage": "ppo", "top_k": "0", "top_p": "0.9"}),
        (
            {"val_size": 0.1, "save_steps": 50, "batch_size": 2},
            {
                "val_size": "0.1",
                "save_steps": "50",
                "per_device_train_batch_size": "2",
                "eval_strategy": "steps",
                "eval_steps": "50",
                "per_device_eval_batch_size": "2",
            },
        ),
    ],
)
def test_what_the_elements_ask_for(elements, keys):
    assert given(**elements) == {"do_train": "true", "model_name_or_path": "m", **keys}


def test_further_keys_come_last_and_none_is_lost():
    further = '{"optim": "adamw_8bit", "learning_rate": 1e-4, "packing": true, "unheard_of": [1]}'
    keys = given(learning_rate="5e-5", extra_args=further)
    assert keys["optim"] == "adamw_8bit" and float(keys["learning_rate"]) == 1e-4 and keys["packing"] == "true"
    assert "unheard_of" in keys


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_further_keys_that_are_none(text):
    with pytest.raises(InvalidInput, match=r"train\.extra_args: is not"):
        given(extra_args=text)


def test_the_table_names_known_keys():
    table = _table()
    lines = [line for values in table["lines"].values() for lines in values.values() for line in lines.splitlines()]
    assert {*table["keys"].values(), *table["pixels"].values(), *(line.partition(":")[0] for line in lines)} <= {
        *catalog()
    }
