"""peft 0.21: an adapter on a layer that tensor parallelism splits takes its size from the part of one process.

transformers 5.24 reads the whole size from the `in_features` of a layer, and gets that of a part from the adapter of a
layer split by columns: `shape '[100, 16]' is invalid for input of size 3200`. Adapters made in their whole size are
what peft then splits itself, and they start as in a run of one process.

https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py `_get_in_out_features`
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def whole_adapters() -> Iterator[None]:
    """Wraps putting adapters on a model: those of linear layers have the whole size of the layer."""
    from peft.tuners.lora import layer
    from torch import nn

    usual = layer._get_in_out_features

    def whole_size(module: nn.Module) -> tuple[Any, Any]:
        return (module.in_features, module.out_features) if type(module) is nn.Linear else usual(module)

    layer._get_in_out_features = whole_size
    try:
        yield
    finally:
        layer._get_in_out_features = usual
