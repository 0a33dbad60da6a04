"""The weights that FSDP 2 gathers at a time, found as accelerate finds them: each layer, the embedding, the head with
the last norm, and what is left.

N processes. The first dimension of a weight is split, filled up to a multiple of N.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.model.modules import unwrap

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.workflow.plan.engine import Engine


@dataclass(frozen=True, slots=True)
class Group:
    gathered_bytes: int
    """Of all its weights, in the format that they compute in."""
    reduced_bytes: int
    """Of the gradients of its trained weights."""
    is_freed: bool
    """After the forward pass, to be gathered again for the backward pass."""


def groups_of(model: "nn.Module", engine: "Engine", half: "torch.dtype | None") -> list[Group]:
    """`half`: the 16-bit format that everything computes in; None for the formats of the weights themselves."""
    found, taken = [], set[int]()
    for modules, is_freed in _modules_of_groups(model, engine):
        weights = [w for module in modules for w in module.parameters() if id(w) not in taken]
        taken |= {id(weight) for weight in weights}
        weights = list({id(weight): weight for weight in weights}.values())
        found.append(
            Group(
                sum(padded_bytes(weight, engine.num_processes, half) for weight in weights),
                sum(padded_bytes(weight, engine.num_processes, half) for weight in weights if weight.requires_grad),
                is_freed,
            )
        )
    return [group for group in found if group.gathered_bytes]


def _modules_of_groups(model: "nn.Module", engine: "Engine") -> "Iterator[tuple[list[nn.Module], bool]]":
    base: Any = unwrap(model)
    names = engine.wrapped or tuple(base._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            yield [module], engine.reshards
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if not is_tied:
        yield [embedding], engine.reshards
    tail = [_last_norm(model), embedding if is_tied else None, head]
    yield [module for module in tail if module is not None], False
    yield [model], False


def _last_norm(model: Any) -> "nn.Module | None":
    """Among the children of the decoder. In a peft model accelerate looks one level too high and finds none."""
    decoder = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else model
    norms = [] if decoder is None else [m for _, m in decoder.named_children() if "Norm" in type(m).__name__]
    return norms[-1] if norms else None


def padded_bytes(weight: "torch.Tensor", num_processes: int, half: "torch.dtype | None" = None) -> int:
    """Of the whole weight, after its first dimension is filled up."""
    size = weight.element_size() if half is None or not weight.is_floating_point() else half.itemsize
    if not weight.ndim:
        return size * num_processes
    rows = -(-weight.shape[0] // num_processes) * num_processes
    return rows * weight.shape[1:].numel() * size
