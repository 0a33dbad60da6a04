"""What the reference refuses about models, adapters, stages and optimizers is refused here, or works and is tested.

One line for each of its rules: the keys, which of them is named, words of the reason and of the remedy.
"""

import json
import subprocess
import sys

import pytest

from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True}
EVAL = {"val_size": 0.1}
PPO = {"stage": "ppo", "reward_model": "r"}
GRPO = {"stage": "grpo", "reward_funcs": "f.py:f", "per_device_train_batch_size": 8}
GKD = {"stage": "gkd", "teacher_model": "t"}
FULL = {"finetuning_type": "full"}
ZERO_3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}

REFUSED = [
    ({"train_from_scratch": True}, "train_from_scratch", "would be lost", "finetuning_type: full"),
    # adapters
    *(
        ({"finetuning_type": kind, key: True}, key, "is for finetuning_type: lora only", "set finetuning_type: lora")
        for kind in ("full", "freeze", "oft")
        for key in ("use_rslora", "use_dora", "pissa_init", "loftq_init")
    ),
    ({**FULL, "loraplus_lr_ratio": 16}, "loraplus_lr_ratio", "two matrices of LoRA", "set finetuning_type: lora"),
    ({**FULL, "use_llama_pro": True}, "use_llama_pro", "full trains everything", "set finetuning_type: freeze"),
    ({**FULL, "adapter_name_or_path": "a"}, "adapter_name_or_path", "lora or oft only", "trained with"),
    *(
        ({**stage, "pissa_init": True}, "pissa_init", "needs as its reference", "leave it out")
        for stage in (PPO, {"stage": "dpo"}, {"stage": "kto"}, {**GRPO, "grpo_beta": 0.1}, {"use_asft_loss": True})
    ),
    ({"pissa_init": True, **ZERO_3}, "pissa_init", "has to see whole weights", "without FSDP and ZeRO-3"),
    # optimizers
    *(
        ({f"use_{name}": True}, f"use_{name}", "training the weights of the model itself", "full or freeze")
        for name in ("galore", "apollo", "badam")
    ),
    *(
        ({**FULL, f"use_{name}": True, **ZERO_3}, f"use_{name}", "needs whole weights", "leave deepspeed out")
        for name in ("galore", "apollo", "badam")
    ),
    ({"pure_bf16": True, **ZERO_3}, "pure_bf16", "ZeRO-3 keeps a copy", "set bf16: true"),
    # stages
    ({"stage": "ppo"}, "reward_model", "nothing else scores", "name an adapter of stage: rm"),
    ({**PPO, **FULL}, "reward_model_type", "runs that train an adapter", "set reward_model_type: full"),
    ({**PPO, "do_train": False, "do_predict": True, **EVAL}, "do_train", "all that this stage does", "do_train: true"),
    *(({**stage, "shift_attn": True}, "shift_attn", "whole text", "leave it out") for stage in (PPO, GRPO)),
    ({"stage": "dpo", "pref_loss": "ipo", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing", "only", "sigmoid"),
    *(
        ({**stage, key: True}, key, "is for stage: gkd or stage: sft only", "stage: sft")
        for stage in ({"stage": "pt"}, {"stage": "rm"}, {"stage": "dpo"}, {"stage": "kto"}, PPO, GRPO)
        for key in ("train_on_prompt", "mask_history")
    ),
    *(
        ({**stage, "neat_packing": True}, "neat_packing", reason, "leave it out")
        for stage, reason in (
            ({"stage": "pt"}, "cuts plain texts"),
            *((stage, "joins conversations") for stage in ({"stage": "rm"}, {"stage": "dpo"}, {"stage": "kto"}, PPO)),
        )
    ),
    *(
        ({**stage, "predict_with_generate": True, **EVAL}, "predict_with_generate", reason, "stage: sft")
        for stage, reason in (
            ({"stage": "pt"}, "writes answers"),
            *(({"stage": name}, "writes answers") for name in ("rm", "dpo", "kto")),
            (GKD, "writes answers"),
            (PPO, "no answers to evaluate"),
        )
    ),
    ({"do_predict": True, **EVAL}, "do_predict", "predict_with_generate turns on", "predict_with_generate: true"),
    *(
        ({"stage": "dpo", "ref_model": "r", key: bits}, key, "4 and 8 bits", "leave it out")
        for key in ("ref_model_quantization_bit",)
        for bits in (1, 16)
    ),
    ({**PPO, "reward_model_quantization_bit": 3}, "reward_model_quantization_bit", "4 and 8", "leave it out"),
    # beyond the reference
    ({**GKD, "train_on_prompt": True, "mask_history": True}, "mask_history", "the last answer only", "one of the two"),
    *(
        ({**stage, "ref_model_adapters": "a"}, "ref_model_adapters", "adapters of ref_model", "set ref_model")
        for stage in (PPO, {**GRPO, "grpo_beta": 0.1}, {"use_asft_loss": True}, {"stage": "dpo"})
    ),
    ({**GRPO, "on_overlong": "split"}, "on_overlong", "whole prompt", "truncate, drop or error"),
    (
        {**PPO, "reward_model": "http://x", "reward_model_type": "api", "reward_model_quantization_bit": 4},
        *("reward_model_quantization_bit", "a server loads its own", "leave it out"),
    ),
]  # fmt: skip


def ident(case) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("keys", "key", "reason", "remedy"), REFUSED, ids=ident)
def test_is_refused(keys, key, reason, remedy):
    with pytest.raises(ConfigError) as caught:
        load_train({**BASE, **keys})
    found = {problem.key: problem for problem in caught.value.problems}
    assert key in found
    assert reason in found[key].reason and remedy in found[key].remedy


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        ({**FULL, "use_galore": True}, "use_galore", "saves memory of the optimizer"),
        ({**FULL, "use_apollo": True}, "use_apollo", "saves memory of the optimizer"),
        ({"quantization_bit": 4, "bf16": True}, "quantization_bit", "costs stability"),
        (
            {"quantization_bit": 4, "do_train": False, "do_eval": True, **EVAL},
            *("quantization_bit", "those of the quantized model"),
        ),
        ({"stage": "dpo", "do_train": False, "do_eval": True, **EVAL}, "ref_model", "compares the model with itself"),
        ({"init_special_tokens": "desc_init"}, "init_special_tokens", "start from noise"),
        # beyond the reference
        ({"create_new_adapter": True}, "create_new_adapter", "none is given"),
        *(
            ({"adapter_name_or_path": "a", key: True, **more}, key, "continues the given adapter")
            for key, more in (
                ("pissa_init", {}),
                ("loftq_init", {"quantization_bit": 4}),
            )
        ),
        ({"stage": "rm", "label_smoothing_factor": 0.1}, "label_smoothing_factor", "only by stage: pt or stage: sft"),
        ({**GRPO, "ref_model_adapters": "a"}, "ref_model_adapters", "grpo_beta is 0"),
        *(
            ({**FULL, "use_badam": True, "badam_mode": mode, key: value}, key, "is read by badam_mode")
            for mode, key, value in (
                *(("layer", "badam_update_ratio", 0.5), ("layer", "badam_mask_mode", "scatter")),
                *(("ratio", "badam_start_block", 2), ("ratio", "badam_switch_mode", "random")),
            )
        ),
    ],
    ids=ident,
)
def test_is_warned_of(keys, key, reason):
    (warning,) = load_train({**BASE, **keys}).warnings
    assert warning.key == key and reason in warning.reason


@pytest.mark.parametrize(
    "keys",
    [
        {"stage": "dpo", "pref_loss": "simpo", "pissa_init": True},
        {**GKD, "pissa_init": True},
        {**GRPO, "pissa_init": True},
        {"pissa_init": True, "adapter_name_or_path": "a", "create_new_adapter": True},
        {**PPO, "finetuning_type": "oft"},
        {"pure_bf16": True, "fsdp": "full_shard"},
    ],
    ids=ident,
)
def test_is_allowed(keys):
    run = load_train({**BASE, **keys})
    assert not [warning for warning in run.warnings if warning.key not in ("fsdp", "deepspeed")]


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
@pytest.mark.parametrize(
    "keys",
    [
        {"pissa_init": True},
        {"loftq_init": True, "quantization_bit": 4},
        {"use_dora": True, "lora_dropout": 0.1},
        {"finetuning_type": "oft", "module_dropout": 0.1},
        {"finetuning_type": "freeze", "use_llama_pro": True},
    ],
    ids=ident,
)
def test_the_file_of_a_training_run_serves_chat_and_export(stage, keys):
    """What concerns the training of an adapter concerns nobody who only reads it."""
    common = {"model_name_or_path": "m", "stage": stage, **keys}
    load_infer(common)
    load_export({**common, "export_dir": "e"})


def test_all_of_it_is_told_without_torch():
    program = (
        "import json, sys\n"
        "from luthier.config.load import load_train\n"
        "from luthier.core.errors import ConfigError\n"
        "for keys in json.load(sys.stdin):\n"
        "    try:\n"
        "        load_train(keys)\n"
        "    except ConfigError:\n"
        "        continue\n"
        "    raise SystemExit(f'not refused: {keys}')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    cases = json.dumps([{**BASE, **keys} for keys, *_ in REFUSED])
    done = subprocess.run([sys.executable, "-c", program], input=cases, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
