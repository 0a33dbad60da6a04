"""transformers 5.24: an adapter in bfloat16 is in float32 once a trainer has loaded a checkpoint of it.

The trainer calls `load_adapter` of peft without `autocast_adapter_dtype=False`, so a run that was resumed, or went back
to its best checkpoint, went on in another format than it began with.

https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py `_load_from_checkpoint`
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def keeping_formats(model: "nn.Module") -> Iterator[None]:
    """While open, an adapter that `model` loads takes the formats of the weights that it has."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield
        return
    vars(model)["load_adapter"] = partial(model.load_adapter, autocast_adapter_dtype=False)
    try:
        yield
    finally:
        del vars(model)["load_adapter"]
