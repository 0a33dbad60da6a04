"""Low-rank projections of gradients, and the weights whose gradients are projected.

m rows and n columns of a weight, r rank. A gradient G (m, n) is projected to P^T G Q^T, and the optimizer's update X
is projected back to P X Q. With one side the other factor is left out: P (m, r) gives (r, n), Q (r, n) gives (m, r).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from luthier.model.modules import require_modules

if TYPE_CHECKING:
    from torch import Tensor, nn


def sides_of(shape: Sequence[int], proj_type: str) -> tuple[bool, bool]:
    """Whether the projection has a P, and a Q. `std` keeps the longer side, `reverse_std` the shorter one."""
    is_tall = shape[0] >= shape[1]
    return {
        "std": (not is_tall, is_tall),
        "reverse_std": (is_tall, not is_tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


def low_shape(shape: Sequence[int], rank: int, sides: tuple[bool, bool]) -> tuple[int, int]:
    """The shape of a projected gradient."""
    rank = min(rank, *shape)
    return (rank if sides[0] else shape[0], rank if sides[1] else shape[1])


def singular_vectors(gradient: "Tensor", rank: int, sides: tuple[bool, bool]) -> "tuple[Tensor | None, Tensor | None]":
    """P and Q from the SVD of a gradient, in its dtype: the first r left and right singular vectors."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    # Copied, since a slice would keep all singular vectors in memory.
    return (
        left[:, :rank].to(gradient.dtype).clone(memory_format=torch.contiguous_format) if sides[0] else None,
        right[:rank].to(gradient.dtype).clone(memory_format=torch.contiguous_format) if sides[1] else None,
    )


def random_vectors(
    gradient: "Tensor", rank: int, sides: tuple[bool, bool], seed: int
) -> "tuple[Tensor | None, Tensor | None]":
    """P or Q with independent normal entries of variance 1 / r, which preserves norms on average."""
    generator = torch.Generator("cpu" if gradient.is_meta else gradient.device).manual_seed(seed)
    rank = min(rank, *gradient.shape)
    shape = (gradient.shape[0], rank) if sides[0] else (rank, gradient.shape[1])
    random = torch.randn(shape, generator=generator, device=gradient.device) / rank**0.5
    return (random.to(gradient.dtype), None) if sides[0] else (None, random.to(gradient.dtype))


def project(gradient: "Tensor", left: "Tensor | None", right: "Tensor | None") -> "Tensor":
    low = gradient if left is None else left.T @ gradient
    return low if right is None else low @ right.T


def project_back(low: "Tensor", left: "Tensor | None", right: "Tensor | None") -> "Tensor":
    full = low if left is None else left @ low
    return full if right is None else full @ right


def projected_weights(model: "nn.Module", wanted: Sequence[str], key: str) -> "set[Tensor]":
    """The trainable weights of the linear layers in `wanted`, or with `all` of all except the output head.

    A name matches a layer if it is one part of the layer's full name, so `mlp` means all linear layers in the MLPs.
    Raises `ModelError` for a name that no module has.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    names = set(() if "all" in wanted else require_modules(model, wanted, key))
    return {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and module is not head
        and module.weight.requires_grad
        and (not names or names & {name, *name.split(".")})
    }
