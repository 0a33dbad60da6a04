"""Checkpoints of models whose layers are split as they are read.

`Trainer.__init__` (transformers 5.24.0, `trainer.py`) refuses to save more than their weights, since it cannot save the
state of their optimizer. `luthier.training.checkpoints.split_state` does that. So the trainer is made as if it saved
weights alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments


@contextmanager
def saving_split_layers(args: "TrainingArguments", model: "nn.Module | None") -> Iterator[None]:
    """Wraps the making of a `Trainer` that saves the optimizer of split layers itself."""
    saves_weights_only = args.save_only_model
    if (getattr(model, "tp_size", None) or 1) > 1:
        args.save_only_model = True
    try:
        yield
    finally:
        args.save_only_model = saves_weights_only
