"""`use_kt`: what KTransformers' copies of transformers and accelerate are told, and what they need of this machine.

Their `TrainingArguments.update_kt_config` is the one switch: while the arguments live, `from_pretrained` leaves the
weights of experts to kt-kernel and puts its layers in their place, and `Trainer` adapts them, gives their weights to
the optimizer, and saves and loads what they learned (`fused_expert_lora.safetensors`) beside the adapter.

Facts from transformers-kt 5.6.0.post6 (`integrations/kt.py`, `trainer.py`) and kt-kernel 0.7.2 (`sft/config.py`).
"""

from pathlib import Path
from typing import Any

from luthier.config.keys.ktransformers import derived_settings, missing_packages
from luthier.config.runs import TrainRun
from luthier.core.errors import MissingExtra, ModelError
from luthier.core.machine import Machine
from luthier.model.backends import Backend, transformers

ROWS_PER_EXAMPLE = 2
"""A pair of answers is two rows of a batch."""


def require_here(machine: Machine) -> None:
    """Raises `ModelError` without an NVIDIA GPU and `MissingExtra` without the packages."""
    if machine.device != "cuda":
        raise ModelError(
            "use_kt: everything but the experts is computed on an NVIDIA GPU, and this machine has none -> leave it out"
        )
    if missing := missing_packages():
        raise MissingExtra(
            f"use_kt needs {', '.join(missing)}, which are not installed; they take the place of transformers and"
            " accelerate: make an environment of their own, as docs/models.md says"
        )


def settings_for(run: TrainRun) -> dict[str, Any]:
    """The mapping `kt_config` of the library. What the run file says in its own `kt_config` is added to it.

    `kt_model_max_length` is the most tokens that go through a layer at once, of all rows of a batch.
    """
    batch = max(run.training["per_device_train_batch_size"], run.training["per_device_eval_batch_size"])
    tokens = -(-run.data.cutoff_len // 8) * 8 * batch * ROWS_PER_EXAMPLE
    keys = run.kt
    own = {
        "kt_weight_path": keys.kt_weight_path,
        "kt_non_expert_weight_path": keys.kt_non_expert_weight_path,
        "kt_expert_checkpoint_path": keys.kt_expert_checkpoint_path,
        "kt_use_lora_experts": keys.kt_use_lora_experts,
        "kt_lora_expert_num": keys.kt_lora_expert_num,
        "kt_lora_expert_intermediate_size": keys.kt_lora_expert_intermediate_size,
    }
    given = {name: value for name, value in own.items() if value is not None}
    derived = derived_settings(run, keys.kt_cpu_activation)
    return {"enabled": True, "kt_model_max_length": tokens, **(keys.kt_config or {}), **given, **derived}


def adapter_folder(run: TrainRun) -> str | None:
    """The folder with the experts' part of the adapter that training continues."""
    names = run.model.adapter_name_or_path
    return str(Path(names[0], run.model.adapter_folder or "").expanduser()) if names else None


def switch_on(args: Any, run: TrainRun, machine: Machine) -> None:
    """Tell `args`, of the library's own class, before a model is loaded. Raises as `require_here` does."""
    require_here(machine)
    args.update_kt_config(settings_for(run), adapter_name_or_path=adapter_folder(run))


BACKEND = Backend(
    name="ktransformers",
    is_chosen=lambda run: isinstance(run, TrainRun) and run.kt.use_kt,
    prepare_arguments=switch_on,
    load_for_training=transformers.BACKEND.load_for_training,
    load_for_inference=transformers.BACKEND.load_for_inference,
)
