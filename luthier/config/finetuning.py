"""The keys that choose the training method, and those that every method reads."""

from dataclasses import dataclass

from luthier.config.fields import variant


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodChoice:
    """The two keys that decide which other keys are read."""

    stage: str = variant("sft")
    """What the model learns from: plain text, answers, ..."""
    finetuning_type: str = variant("lora")
    """Which weights learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuningConfig:
    pure_bf16: bool = False
    """Hold weights and optimizer state in bfloat16, without a float32 copy."""
    disable_shuffling: bool = False
    """Take the rows in the order they have."""
    early_stopping_steps: int | None = None
    """Stop after this many evaluations without improvement of `metric_for_best_model`."""
    plot_loss: bool = False
    """Draw the loss, and each other metric, as a PNG in `output_dir`."""
    include_effective_tokens_per_second: bool = False
    """Report the tokens per second and device over the whole run, as `effective_tokens_per_sec`."""
    profile_modules: tuple[str, ...] = ()
    """Patterns of full module names, e.g. `*.mlp`, whose forward and backward passes are timed and told at each log."""
    freeze_vision_tower: bool = True
    """Leave the parts that see and hear as they are, in a model that reads more than text."""
    freeze_multi_modal_projector: bool = True
    """Leave the part between them and the language model as it is; `lora_target: all` never adapts it."""
    freeze_language_model: bool = False
    """Leave the language model as it is."""
