"""Gradient checkpointing: keep the input of each block only, and compute the block again in the backward pass.

https://arxiv.org/abs/1604.06174. Blocks below the first trainable parameter need no gradient, so they are neither kept
nor computed again: with the last two layers training, the backward pass ends there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from luthier.core.log import warn

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def enable_checkpointing(model: "PreTrainedModel", *, use_reentrant: bool) -> None:
    """Checkpoint the blocks of `model`, whose trainable parameters must be settled by now.

    `use_reentrant`: PyTorch's reentrant way, which needs an input with a gradient and gets one here.
    """
    if not model.supports_gradient_checkpointing:
        warn(f"{type(model).__name__} cannot be checkpointed: all activations are kept in memory")
        return
    model._set_gradient_checkpointing(enable=True)
    for module in model.modules():
        if "gradient_checkpointing" in vars(module):
            module._gradient_checkpointing_func = _checkpointer(module, use_reentrant)  # type: ignore[assignment]


def _checkpointer(block: "nn.Module", use_reentrant: bool) -> Callable[..., Any]:
    from torch import Tensor
    from torch.utils.checkpoint import checkpoint

    def run(function: Callable[..., Any], *args: Any) -> Any:
        """`args[0]` are the hidden states; whatever carries no gradient is bound to `function` already."""
        inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        if not any(tensor.requires_grad for tensor in inputs):
            # Asked each time, since an optimizer such as BAdam changes it.
            if not any(weight.requires_grad for weight in block.parameters()):
                return function(*args)
            if use_reentrant:
                inputs[0].requires_grad_(True)
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    return run
