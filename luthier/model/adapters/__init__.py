"""What an adapter method is: which weights of a model learn. Each other file in this folder is one `finetuning_type`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import Problem

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun


@dataclass(frozen=True, kw_only=True)
class Adapter:
    name: str
    config: type
    """The YAML keys that only this method understands."""
    apply: Callable[..., Any]
    """(model, config, ...) -> the model with exactly the right parameters trainable (see `luthier.model.load.prepare_for_training`)."""
    check: "Callable[[TrainRun], Iterable[Problem]]" = lambda run: ()
    """Rules between keys that concern this method; runs before torch is imported."""
