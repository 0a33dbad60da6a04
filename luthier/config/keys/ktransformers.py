"""Keys of KTransformers, which trains the experts of a mixture of experts on the CPU and everything else on a GPU.

It brings its own builds of transformers and accelerate under their usual module names, so it needs an environment of
its own. Its rules stand in `luthier.config.rules.ktransformers`; `luthier.model.backends.ktransformers` passes the
keys on.
"""

from dataclasses import dataclass
from typing import Any, Literal

from luthier.core.versions import library_version

PACKAGES = ("kt-kernel", "transformers-kt", "accelerate-kt")


@dataclass(frozen=True, slots=True, kw_only=True)
class KTransformersConfig:
    use_kt: bool = False
    """Train the experts of a mixture-of-experts model on the CPU, with KTransformers."""
    kt_cpu_activation: Literal["retain", "recompute"] | None = None
    """Keep the activations of those experts, or recompute them; unset does as the layers on the GPU."""
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
    """More settings of KTransformers (kt_backend, kt_num_threads, ...)."""


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
