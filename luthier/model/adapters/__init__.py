"""What an adapter method is: which parameters of a model are trained. Each other file here is one `finetuning_type`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config.rules.engine import NO_RULES, Rules


@dataclass(frozen=True, kw_only=True)
class Adapter:
    name: str
    config: type
    """The YAML keys that only this method understands."""
    apply: Callable[..., Any]
    """(model, config, given, new_tokens, pure_bf16, frozen, original) -> the model, with `requires_grad` set.

    `given`: the `GivenAdapters` of `adapter_name_or_path`; `new_tokens`: the `NewTokens` of the run; `pure_bf16`:
    new weights stay in bfloat16; `frozen`: the parts of a multimodal model that stay frozen; `original`: loads the
    model once more, with the weights as they are in its files.
    See `luthier.model.loading.training.load_for_training`.
    """
    adds_weights: bool = False
    """Whether new weights are trained and saved as an adapter; else the model itself is trained and saved."""
    trains_everything: bool = False
    """Whether all parameters are trained, except for the frozen parts of a multimodal model."""
    finish: "Callable[[Any, Path], None]" = lambda config, folder: None
    """(config, output_dir) -> what is left to do when a run has saved its adapter there."""
    check: Rules = NO_RULES
    """Rules between keys that concern this method; checked before torch is imported."""
