"""The last product of a block, which is not computed again when the rest of the block is.

A block of the Llama kind ends with

    out = x + h W^T        dx = dout        dh = dout W        dW = dout^T h

No gradient depends on the numbers of `out`. Gradient checkpointing computes the block a second time for what its
backward pass reads, and h W^T is not part of that. In Llama-3.1-8B it is a quarter of the products of a block.

PyTorch's way that is not reentrant stops as soon as all that the first pass kept is there again. A layer of PyTorch
keeps its input before it multiplies, so its product is left out anyway; a kernel of Luthier keeps what it needs
afterwards, so it is told to leave the product out. Both passes have to keep the same tensors there, in the same order.

Whether this holds for a block is tried: its own code is given several outputs of the MLP, NaN among them, and has to
give the same gradients for all.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.kernels.fuse import FAULTS, Trials, last_product_left_out, probe_of, tried

TRIED = (1.0, -2.0, float("inf"), float("nan"))
"""What the MLP puts out in the trial."""


def computed_twice(block: nn.Module, function: Callable[..., Any], *, use_reentrant: bool) -> Callable[..., Any]:
    """`function`, which computes `block`, for `torch.utils.checkpoint`: from its second call on it leaves out the last
    product if it can. `block`: one that `only_adds_mlp`."""
    has_run = False

    def run(*args: Any) -> Any:
        nonlocal has_run
        if not has_run or torch.compiler.is_compiling():
            has_run = True
            return function(*args)
        with last_product_left_out(block.mlp, keeps_the_same=not use_reentrant):  # type: ignore[arg-type]
            return function(*args)

    return run


def only_adds_mlp(block: nn.Module, trials: Trials | None = None) -> bool:
    """Whether no gradient of this block depends on the numbers that its part `mlp` puts out."""
    has_own_code = "forward" in vars(block)
    return "mlp" in block._modules and not has_own_code and bool(tried(_gradients_are_alike, block, trials))


def _gradients_are_alike(block: nn.Module) -> bool:
    try:
        found = [_gradients(block, value, dtype) for dtype in (torch.float32, torch.float16) for value in TRIED]
    except FAULTS:
        return False
    first, *others = (torch.stack([gradient.float() for gradient in gradients]) for gradients in found)
    return all(torch.equal(first, other) for other in others)


def _gradients(block: nn.Module, value: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of the sum of all outputs, by the input of the block and by the output of its MLP."""
    with torch.device("cpu"):
        x = torch.ones(1, 2, 4, dtype=dtype, requires_grad=True)
        out = torch.full((1, 2, 4), value, dtype=dtype, requires_grad=True)
    probe = probe_of(block)
    for name in block._modules:
        vars(probe)[name] = _attention if "attn" in name else _reads
    vars(probe).update(mlp=lambda _: out, gradient_checkpointing=False)
    names = inspect.signature(type(block).forward).parameters
    given = {
        name: None for name, one in names.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    }
    given.pop("self")
    found = probe.forward(**{**given, "hidden_states": x})
    return torch.autograd.grad((found[0] if isinstance(found, tuple) else found).sum(), (x, out))


def _reads(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for a part whose gradient depends on its input, as that of a norm does."""
    return x * x


def _attention(*args: Any, **given: Any) -> tuple[Tensor, None]:
    return _reads(args[0] if args else given["hidden_states"]), None
