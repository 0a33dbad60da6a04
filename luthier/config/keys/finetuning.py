"""The keys that choose the training method, and those that every method reads."""

from dataclasses import dataclass

from luthier.config.keys.fields import variant

_STAGES_OF_OTHER_KEYS = {
    **{name: f"set stage: dpo and pref_loss: {name}" for name in ("orpo", "simpo", "ipo", "sppo")},
    **{name: f"set stage: dpo and pref_loss: {name}_pair" for name in ("exo", "bco")},
    **{name: f"set stage: sft and use_{name}_loss: true" for name in ("dft", "eaft", "asft")},
    **{name: f"set stage: grpo and loss_type: {name}" for name in ("dapo", "dr_grpo", "gspo", "rloo")},
    "distill": "set stage: gkd, with teacher_model",
    "pretrain": "set stage: pt",
    "reward": "set stage: rm",
}
_TYPES_OF_OTHER_KEYS = {
    "dora": "set finetuning_type: lora and use_dora: true",
    "llama_pro": "set finetuning_type: freeze and use_llama_pro: true",
    "loftq": "set finetuning_type: lora, quantization_bit: 4 and loftq_init: true",
    "lora+": "set finetuning_type: lora and loraplus_lr_ratio: 16",
    "pissa": "set finetuning_type: lora and pissa_init: true",
    "qlora": "set finetuning_type: lora and quantization_bit: 4",
    "qoft": "set finetuning_type: oft and quantization_bit: 4",
    "rslora": "set finetuning_type: lora and use_rslora: true",
    **{name: f"set finetuning_type: full and use_{name}: true" for name in ("galore", "apollo", "badam")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodChoice:
    """The two keys that decide which other keys are read."""

    stage: str = variant("sft", remedies=_STAGES_OF_OTHER_KEYS)
    """Training method."""
    finetuning_type: str = variant("lora", remedies=_TYPES_OF_OTHER_KEYS)
    """Which parameters are trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuningConfig:
    pure_bf16: bool = False
    """Hold weights and optimizer state in bfloat16, without a float32 copy."""
    disable_shuffling: bool = False
    """Keep the rows in the order of the dataset."""
    early_stopping_steps: int | None = None
    """Stop after this many evaluations without improvement of `metric_for_best_model`."""
    skip_memory_check: bool = False
    """Start even if the plan says that the memory of this machine does not suffice."""
    plot_loss: bool = False
    """Plot the loss, and each other metric, as a PNG file in `output_dir`."""
    include_effective_tokens_per_second: bool = False
    """Report the tokens per second and device over the whole run, as `effective_tokens_per_sec`."""
    profile_modules: tuple[str, ...] = ()
    """Patterns of full module names, e.g. `*.mlp`, whose forward and backward passes are timed and logged."""
    freeze_vision_tower: bool = True
    """Freeze the vision and audio towers of a multimodal model."""
    freeze_multi_modal_projector: bool = True
    """Freeze the projector between the towers and the language model; `lora_target: all` never adapts it."""
    freeze_language_model: bool = False
    """Freeze the language model."""
    cache_media_features: bool = False
    """Keep what frozen towers make of images and videos on disk, so that they run once for all epochs and runs."""
