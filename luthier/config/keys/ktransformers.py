"""KTransformers: the experts of a mixture of experts are computed and learned on the CPU, everything else on a GPU.

It trains through its own copies of transformers and accelerate, which bear the same names as the ones they replace, so
luthier runs in an environment of its own there. What it demands and excludes stands here;
`luthier.model.backends.ktransformers` hands the keys on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.config.keys.quantization import shards_weights
from luthier.config.rules.engine import Rule, Rules
from luthier.core.versions import library_version

PACKAGES = ("kt-kernel", "transformers-kt", "accelerate-kt")


@dataclass(frozen=True, slots=True, kw_only=True)
class KTransformersConfig:
    use_kt: bool = False
    """Run the experts of a mixture-of-experts model on the CPU, by KTransformers, while training."""
    kt_cpu_activation: Literal["retain", "recompute"] | None = None
    """Keep the activations of those experts, or compute them again; unset as the layers on the GPU."""
    kt_weight_path: str | None = None
    """INT8 weights of the experts."""
    kt_non_expert_weight_path: str | None = None
    """BF16 weights of everything else."""
    kt_expert_checkpoint_path: str | None = None
    """Weights of the experts to be converted while loading."""
    kt_use_lora_experts: bool | None = None
    """Add adapters as experts on the accelerator."""
    kt_lora_expert_num: int | None = None
    """Number of those experts."""
    kt_lora_expert_intermediate_size: int | None = None
    """Width of those experts."""
    kt_config: dict[str, Any] | None = None
    """More settings of KTransformers, by their names there (kt_backend, kt_num_threads, ...)."""


OWN_SETTINGS = (
    *("kt_weight_path", "kt_non_expert_weight_path", "kt_expert_checkpoint_path", "kt_use_lora_experts"),
    *("kt_lora_expert_num", "kt_lora_expert_intermediate_size"),
)
"""Keys that are settings of KTransformers under the same name."""


def derived_settings(run: Any, kt_cpu_activation: str | None) -> dict[str, Any]:
    """The settings of KTransformers that other keys of a training run decide, by their names there."""
    gpu = "retain" if run.model.disable_gradient_checkpointing else "recompute"
    settings: dict[str, Any] = {
        "kt_activation_policy": {"cpu": kt_cpu_activation or gpu, "gpu": gpu},
        "kt_train_mode": run.finetuning_type,
    }
    if run.finetuning_type == "lora":
        alpha = run.adapter.lora_alpha
        settings["kt_lora_rank"] = run.adapter.lora_rank
        settings["kt_lora_alpha"] = float(2 * run.adapter.lora_rank if alpha is None else alpha)
        settings["kt_lora_dropout"] = run.adapter.lora_dropout
    return settings


def missing_packages() -> tuple[str, ...]:
    return tuple(name for name in PACKAGES if library_version(name) is None)


def _excludes(keys: tuple[str, ...], reason: str, remedy: str, broken: Any) -> Rule:
    return Rule(keys, reason, remedy, lambda run: run.kt.use_kt and broken(run))


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
        _excludes(
            ("use_kt",),
            f"needs the packages {', '.join(PACKAGES)}, which are not all installed; they take the place of"
            " transformers and accelerate, so they need an environment of their own",
            "make one as docs/models.md says, or leave it out and see quantization_bit and use_unsloth_gc for models"
            " that do not fit into memory",
            lambda run: bool(missing_packages()),
        ),
        Rule(
            ("kt_cpu_activation", "use_kt"),
            "is about the experts of KTransformers, and use_kt is off",
            "set use_kt: true, or leave it out",
            lambda run: not run.kt.use_kt and run.kt.kt_cpu_activation is not None,
        ),
        _excludes(
            ("kt_cpu_activation", "disable_gradient_checkpointing"),
            "experts cannot be computed again where the layers around them are not",
            "set kt_cpu_activation: retain, or leave disable_gradient_checkpointing out",
            lambda run: run.kt.kt_cpu_activation == "recompute" and run.model.disable_gradient_checkpointing,
        ),
        *(
            _excludes(
                (key, "use_kt"),
                "and KTransformers both decide how layers are computed and kept",
                "leave one of the two out",
                lambda run, key=key: bool(run.given.get(key)),
            )
            for key in ("use_unsloth", "use_unsloth_gc")
        ),
        _excludes(
            ("gradient_checkpointing", "use_kt"),
            "is transformers' own way of computing layers again, in which the experts would be computed twice",
            "leave it out; layers are computed again unless disable_gradient_checkpointing is on",
            lambda run: "gradient_checkpointing" in run.given and bool(run.given["gradient_checkpointing"]),
        ),
        _excludes(
            ("fsdp_config", "use_kt"),
            "asks FSDP to compute layers again, in which the experts would be computed twice",
            "leave activation_checkpointing out of it",
            _fsdp_recomputes,
        ),
        _excludes(
            ("finetuning_type", "use_kt"),
            "KTransformers trains LoRA adapters or the whole model",
            "set finetuning_type: lora or full",
            lambda run: run.finetuning_type not in ("lora", "full"),
        ),
        _excludes(
            ("adapter_name_or_path", "use_kt"),
            "KTransformers goes on with one adapter, in a folder of this machine",
            "name one such folder",
            _adapter_is_elsewhere,
        ),
        _excludes(
            ("adapter_folder", "adapter_name_or_path", "use_kt"),
            "leads out of the folder of the adapter",
            "name a folder in it",
            _folder_escapes,
        ),
        _excludes(
            ("kt_config", "kt_cpu_activation", "lora_rank", "finetuning_type"),
            "says otherwise than a key of the run file that decides the same",
            "leave that setting out of kt_config",
            _conflicts,
        ),
        _excludes(
            ("reward_model_type", "use_kt"),
            "KTransformers cannot put the adapter of a reward model on the policy",
            "set reward_model_type: full, or leave use_kt out",
            lambda run: run.stage == "ppo" and run.method.reward_model_type == "lora",
        ),
        _excludes(
            ("use_kt", "deepspeed"),
            "makes its optimizer after the model is laid out, which it does with FSDP 2 only",
            "leave deepspeed out",
            lambda run: run.training["deepspeed"] is not None or (shards_weights(run) and not run.training["fsdp"]),
        ),
        _excludes(
            ("use_kt", "optim"),
            "gives the optimizer weights that are outside of the model, which only those of transformers take",
            "leave out use_galore, use_apollo, use_badam and the like",
            lambda run: bool(run.optimizers),
        ),
        *(
            _excludes(
                (key, "use_kt"),
                "changes weights that KTransformers reads from the files by itself",
                "leave one of the two out",
                lambda run, key=key: bool(run.given.get(key)),
            )
            for key in ("train_from_scratch", "mixture_of_depths")
        ),
        _excludes(
            ("quantization_bit", "use_kt"),
            "quantizes weights that KTransformers reads from the files by itself",
            "leave one of the two out; kt_weight_path names experts of fewer bits",
            lambda run: run.quantization.quantization_bit is not None,
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
