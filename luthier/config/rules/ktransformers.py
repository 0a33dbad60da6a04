"""Rules about `use_kt`: what KTransformers needs, and what it does not go together with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.config.keys.ktransformers import OWN_SETTINGS, PACKAGES, derived_settings, missing_packages
from luthier.config.keys.sharding import shards_weights
from luthier.config.rules.engine import Rule, Rules, When, all_of, is_given, is_set, is_turned_on, not_
from luthier.config.rules.model import scores_with_adapter

_with_kt = When(is_set("kt", "use_kt"))


def _conflicts(run: Any) -> bool:
    """Whether kt_config says otherwise than a key that decides the same."""
    decided = derived_settings(run, run.kt.kt_cpu_activation)
    decided |= {name: value for name in OWN_SETTINGS if (value := getattr(run.kt, name)) is not None}
    return any(name in decided and decided[name] != value for name, value in (run.kt.kt_config or {}).items())


def _fsdp_recomputes(run: Any) -> bool:
    config = run.training["fsdp_config"]
    names = ("activation_checkpointing", "fsdp_activation_checkpointing")
    return isinstance(config, Mapping) and any(config.get(name) for name in names)


def _adapter_is_elsewhere(run: Any) -> bool:
    names = run.model.adapter_name_or_path
    return len(names) > 1 or any(not Path(name).expanduser().is_dir() for name in names)


def _folder_escapes(run: Any) -> bool:
    names, folder = run.model.adapter_name_or_path, run.model.adapter_folder
    if folder is None or not names:
        return False
    root = Path(names[0]).expanduser().resolve()
    return not (root / folder).resolve().is_relative_to(root)


KT_RULES = Rules(
    (
        Rule(
            ("use_kt",),
            f"needs the packages {', '.join(PACKAGES)}, which are not all installed; they take the place of"
            " transformers and accelerate, so they need an environment of their own",
            "make one as docs/models.md says, or leave it out and see quantization_bit and use_unsloth_gc for models"
            " that do not fit into memory",
            all_of(is_set("kt", "use_kt"), lambda run: bool(missing_packages())),
            is_local=True,
        ),
        Rule(
            ("kt_cpu_activation", "use_kt"),
            "is about the experts of KTransformers, and use_kt is off",
            "set use_kt: true, or leave it out",
            all_of(not_(is_set("kt", "use_kt")), is_given("kt", "kt_cpu_activation")),
        ),
        _with_kt.refuses(
            ("kt_cpu_activation", "disable_gradient_checkpointing"),
            "experts cannot be computed again where the layers around them are not",
            "set kt_cpu_activation: retain, or leave disable_gradient_checkpointing out",
            lambda run: run.kt.kt_cpu_activation == "recompute" and run.model.disable_gradient_checkpointing,
        ),
        *(
            _with_kt.refuses(
                (key, "use_kt"),
                "and KTransformers both decide how layers are computed and kept",
                "leave one of the two out",
                is_turned_on(key),
            )
            for key in ("use_unsloth", "use_unsloth_gc")
        ),
        _with_kt.refuses(
            ("gradient_checkpointing", "use_kt"),
            "is transformers' own way of computing layers again, in which the experts would be computed twice",
            "leave it out; layers are computed again unless disable_gradient_checkpointing is on",
            lambda run: "gradient_checkpointing" in run.given and bool(run.given["gradient_checkpointing"]),
        ),
        _with_kt.refuses(
            ("fsdp_config", "use_kt"),
            "asks FSDP to compute layers again, in which the experts would be computed twice",
            "leave activation_checkpointing out of it",
            _fsdp_recomputes,
        ),
        _with_kt.refuses(
            ("finetuning_type", "use_kt"),
            "KTransformers trains LoRA adapters or the whole model",
            "set finetuning_type: lora or full",
            lambda run: run.finetuning_type not in ("lora", "full"),
        ),
        _with_kt.refuses(
            ("adapter_name_or_path", "use_kt"),
            "KTransformers continues one adapter, in a folder of this machine",
            "name one such folder",
            _adapter_is_elsewhere,
        ),
        _with_kt.refuses(
            ("adapter_folder", "adapter_name_or_path", "use_kt"),
            "leads out of the folder of the adapter",
            "name a folder in it",
            _folder_escapes,
        ),
        _with_kt.refuses(
            ("kt_config", "kt_cpu_activation", "lora_rank", "finetuning_type"),
            "says otherwise than a key of the run file that decides the same",
            "leave that setting out of kt_config",
            _conflicts,
        ),
        _with_kt.refuses(
            ("reward_model_type", "use_kt"),
            "KTransformers cannot put the adapter of a reward model on the policy",
            "set reward_model_type: full, or leave use_kt out",
            scores_with_adapter,
        ),
        _with_kt.refuses(
            ("use_kt", "deepspeed"),
            "makes its optimizer after the model is laid out, which it does with FSDP 2 only",
            "leave deepspeed out",
            lambda run: run.training["deepspeed"] is not None or (shards_weights(run) and not run.training["fsdp"]),
        ),
        _with_kt.refuses(
            ("use_kt", "optim"),
            "gives the optimizer weights that are outside of the model, which only those of transformers take",
            "leave out use_galore, use_apollo, use_badam and the like",
            lambda run: bool(run.optimizers),
        ),
        *(
            _with_kt.refuses(
                (key, "use_kt"),
                "changes weights that KTransformers reads from the files by itself",
                "leave one of the two out",
                is_turned_on(key),
            )
            for key in ("train_from_scratch", "mixture_of_depths")
        ),
        _with_kt.refuses(
            ("quantization_bit", "use_kt"),
            "quantizes weights that KTransformers reads from the files by itself",
            "leave one of the two out; kt_weight_path names experts of fewer bits",
            is_given("quantization", "quantization_bit"),
        ),
    )
)
KT_ELSEWHERE_RULES = Rules(
    (
        Rule(
            ("use_kt",),
            "is for training; answers and exports take its adapters in the way of KTransformers' own programs",
            "leave it out, or serve the model with SGLang and kt-kernel",
            lambda run: bool(run.given.get("use_kt")),
        ),
    )
)
"""For the commands that do not train."""
