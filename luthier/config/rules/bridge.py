"""Rules about `USE_MEGATRON_BRIDGE=1`: what Megatron-Bridge does not have, or has under another key."""

import os
from typing import Any

from luthier.config.rules.engine import Rule, Rules, When, all_of, is_turned_on
from luthier.config.rules.mcore import megatron_rules, under_mcore
from luthier.config.sections import is_on

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
"""`lr_scheduler_type` -> what Megatron-core calls it."""
_CHOOSE = "leave it out, or unset USE_MEGATRON_BRIDGE"
_PLAIN_LORA = "is not there with Megatron-Bridge, which trains plain adapters on all linear layers"
_ONE_EVALUATION = "needs an evaluation that says which step was best, and Megatron-Bridge evaluates for the log alone"


def under_bridge(run: Any) -> bool:
    return is_on(os.environ, "USE_MEGATRON_BRIDGE")


def under_megatron(run: Any) -> bool:
    """Whether a library that trains with Megatron-core takes the run over."""
    return under_mcore(run) or under_bridge(run)


_bridge = When(under_bridge)
_ON = {
    **dict.fromkeys(("use_dora", "use_rslora", "pissa_init", "loftq_init", "use_llama_pro"), _PLAIN_LORA),
    **dict.fromkeys(("additional_target", "create_new_adapter"), _PLAIN_LORA),
    "adapter_name_or_path": "begins with an adapter of peft, which Megatron-Bridge does not read",
    "use_packed_sequences": "lets Megatron-Bridge pack rows, and rows are luthier's own here",
    "eval_on_each_dataset": "is not there with Megatron-Bridge, which evaluates on one set of rows",
    "enable_torch_profiler": "profiles luthier's own training step",
    "early_stopping_steps": _ONE_EVALUATION,
    "lr_scheduler_kwargs": "belongs to a schedule of transformers, and Megatron-core has its own",
    "fp16": "is not read, since mixed_precision chooses the number format: fp16_mixed for this one",
}
"""Key -> why it cannot be turned on."""


def _lists_targets(run: Any) -> bool:
    return run.finetuning_type == "lora" and tuple(run.adapter.lora_target) != ("all",)


BRIDGE_RULES = Rules(
    (
        *megatron_rules("bridge", "USE_MEGATRON_BRIDGE", "Megatron-Bridge", under_bridge),
        Rule(
            ("USE_MEGATRON_BRIDGE",),
            "two libraries would train with Megatron-core",
            "unset one of USE_MEGATRON_BRIDGE and USE_MCA",
            all_of(under_bridge, under_mcore),
            file="environment",
        ),
        _bridge.refuses(
            ("finetuning_type",),
            "is not there with Megatron-Bridge, which trains whole models and LoRA",
            "set finetuning_type: full or lora, or unset USE_MEGATRON_BRIDGE",
            lambda run: run.finetuning_type not in ("full", "lora"),
        ),
        _bridge.refuses(("lora_target",), _PLAIN_LORA, "write lora_target: all", _lists_targets),
        _bridge.refuses(
            ("do_train",),
            "is off, and Megatron-Bridge evaluates only while it trains",
            "set do_train: true, or unset USE_MEGATRON_BRIDGE",
            lambda run: not run.trains,
        ),
        _bridge.refuses(
            ("lr_scheduler_type",),
            "is not a schedule of Megatron-core",
            f"use one of {', '.join(SCHEDULES)}",
            lambda run: run.training["lr_scheduler_type"] not in SCHEDULES,
        ),
        _bridge.refuses(
            ("save_strategy",),
            _ONE_EVALUATION,
            "set save_strategy: steps, epoch or no",
            lambda run: run.training["save_strategy"] == "best",
        ),
        _bridge.refuses(
            ("optim",),
            "is not read, and neither are the optimizers of luthier, since Megatron-Bridge trains with AdamW",
            _CHOOSE,
            lambda run: "optim" in run.changed or bool(run.optimizers),
        ),
        *(_bridge.refuses((key,), reason, _CHOOSE, is_turned_on(key)) for key, reason in _ON.items()),
    )
)
