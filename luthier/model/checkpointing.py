"""Gradient checkpointing: keep the input of each block only, and compute the block again in the backward pass.

https://arxiv.org/abs/1604.06174. Blocks below the first trainable parameter need no gradient, so they are neither kept
nor computed again: with the last two layers training, the backward pass ends there.

Two ways to another balance of time and memory: `checkpoint_every: n` computes only every n-th block again and keeps the
activations of the others; `use_unsloth_gc` copies the saved inputs to main memory during the forward pass.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from luthier.core.log import warn
from luthier.model.compat import ktransformers
from luthier.model.multimodal import text_part

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def enable_checkpointing(
    model: "PreTrainedModel",
    *,
    use_reentrant: bool,
    offload: bool = False,
    checkpoint_every: int = 1,
    num_layers: int | None = None,
) -> None:
    """Checkpoint the blocks of `model`.

    `use_reentrant`: PyTorch's reentrant way, which needs an input with a gradient and gets one here. `offload`: keep
    the inputs of blocks in main memory, which needs the reentrant way. `checkpoint_every`: 1 for all blocks.
    `num_layers`: the first so many blocks, None for all. Both count those of the language model; all blocks of an
    encoder of images are computed again.
    """
    if not model.supports_gradient_checkpointing:
        warn(f"{type(model).__name__} cannot be checkpointed: all activations are kept in memory")
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    model._set_gradient_checkpointing(enable=True)
    blocks = [module for module in text_part(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    end = len(blocks) if num_layers is None else num_layers
    trials: dict[Any, Any] = {}
    kept = {id(block) for index, block in enumerate(blocks) if index % checkpoint_every or index >= end}
    for module in model.modules():
        if "gradient_checkpointing" in vars(module):
            way = _run_once if id(module) in kept else _checkpointer(module, use_reentrant or offload, offload, trials)
            module._gradient_checkpointing_func = way  # type: ignore[assignment]


def is_checkpointed(model: "nn.Module") -> bool:
    """Whether any layer is computed again in the backward pass."""
    return any(vars(module).get("gradient_checkpointing") for module in model.modules())


def _run_once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _checkpointer(block: "nn.Module", use_reentrant: bool, offload: bool, trials: dict[Any, Any]) -> Callable[..., Any]:
    from torch import Tensor
    from torch.utils.checkpoint import checkpoint

    from luthier.model.kernels.block_end import computed_twice, only_adds_mlp
    from luthier.model.kernels.offloading import offloaded

    leaves_out = only_adds_mlp(block, trials)

    def run(function: Callable[..., Any], *args: Any) -> Any:
        """`args[0]` are the hidden states; whatever carries no gradient is bound to `function` already."""
        inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        if not any(tensor.requires_grad for tensor in inputs):
            # Asked at each step, since an optimizer may train the blocks in turn (BAdam).
            if not any(weight.requires_grad for weight in block.parameters()):
                return function(*args)
            if not inputs:  # they are bound to `function`, too (Llama 4); the reentrant way would miss their gradient
                return checkpoint(function, *args, use_reentrant=False)
            if use_reentrant:
                inputs[0].requires_grad_(True)
        if ktransformers.is_loading():
            return checkpoint(function, *args, use_reentrant=False, context_fn=ktransformers.recomputing())
        with offloaded() if offload else contextlib.nullcontext():
            again = computed_twice(block, function, use_reentrant=use_reentrant) if leaves_out else function
            return checkpoint(again, *args, use_reentrant=use_reentrant)

    return run
