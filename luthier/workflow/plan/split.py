"""What one process has of a model whose layers are shared by P processes (`tp_size`), by the plan of transformers.

A dense model of 1/P of the heads and of the MLP has the shapes of that part, so it stands for it in a trace: hidden
states are whole, what is inside of attention and MLP is 1/P. Only what is as wide as the vocabulary differs:

embedding, head    1/P of weights, gradients and optimizer
head               gathered as a whole for the loss, and so is its gradient for a moment
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier.model.modules import unwrap
from luthier.workflow.plan.memory import Held
from luthier.workflow.plan.shape import Shape, Unplanned
from luthier.workflow.plan.states import states_bytes
from luthier.workflow.plan.trace import Trace

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from luthier.config.runs import TrainRun

_SPLIT_DIMENSION = {"colwise": 0, "embedding_rowwise": 0, "rowwise": 1, "replicated_with_grad_allreduce": None}
"""How transformers splits a matrix (output, input) -> which of its dimensions is split."""
_OF_HEAD = "colwise_gather_output"
"""In the layers, it would make what is inside of them whole."""
_COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def narrow(config: "PreTrainedConfig", num_processes: int) -> None:
    """Make it the config of a model with the part of one process. Raises `Unplanned` if a part is not whole."""
    text: Any = config.get_text_config()
    if getattr(text, "head_dim", None) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    for name in _COUNTS:
        count = getattr(text, name, None)
        if not isinstance(count, int) or count % num_processes:
            raise Unplanned(f"{num_processes} processes cannot have equal parts of its {name} ({count})")
        setattr(text, name, count // num_processes)


def wide_weights(whole: Shape, part: Shape, num_processes: int) -> "list[nn.Parameter]":
    """The weights that are split, and that `part`, a model of a narrow config, has whole: those of the vocabulary.

    Raises `Unplanned` for a model whose parts have other shapes.
    """
    base: Any = unwrap(whole.model)
    weights, found, head = dict(_named(part.model)), [], base.get_output_embeddings()
    of_head = set() if head is None else {id(weight) for weight in head.parameters()}
    for name, weight in _named(whole.model):
        pattern = re.sub(r"\.\d+(?=\.)", ".*", name)
        style = base._tp_plan.get(pattern, base._tp_plan.get(pattern.rpartition(".")[0]))
        expected, dimension = list(weight.shape), None
        if style == _OF_HEAD and id(weight) in of_head:
            dimension = 0
        elif style is not None and style not in _SPLIT_DIMENSION:
            raise Unplanned(f"its layers are split in a way of their own ({style})")
        elif style is not None:
            dimension = _SPLIT_DIMENSION[style]
        if dimension is not None and dimension < len(expected):
            expected[dimension] //= num_processes
        own = weights.get(name)
        if own is None or list(own.shape) not in (expected, list(weight.shape)):
            raise Unplanned(f"{name} is split into parts of an unknown shape")
        if list(own.shape) != expected:
            found.append(own)
    return list({id(weight): weight for weight in found}.values())


def _named(model: "nn.Module") -> "Iterator[tuple[str, nn.Parameter]]":
    """Without adapters."""
    for name, weight in unwrap(model).named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), weight


def split(run: "TrainRun", held: Held, shape: Shape, wide: "list[nn.Parameter]", num_processes: int) -> Held:
    """`held`: by a process with the whole vocabulary."""
    surplus = surplus_bytes(wide, num_processes)
    names = {id(weight) for weight in wide}

    def share(weight: "torch.Tensor") -> int:
        return weight.numel() // (num_processes if id(weight) in names else 1)

    return replace(
        held,
        weights_bytes=held.weights_bytes - surplus,
        gradients_bytes=held.gradients_bytes - surplus_bytes(_with_shared_gradients(shape, wide), num_processes),
        optimizer_bytes=states_bytes(run.training["optim"], shape.model, share),
        gathered_bytes=_head_bytes(shape),
    )


def surplus_bytes(wide: "list[nn.Parameter]", num_processes: int) -> int:
    """What a process does not have of these."""
    return sum(weight.nbytes - weight.nbytes // num_processes for weight in wide)


def _with_shared_gradients(shape: Shape, wide: "list[nn.Parameter]") -> "list[nn.Parameter]":
    """Those of which each process has a part of the gradient. PyTorch gives every process the whole gradient of an
    embedding, unless it is the weight of the head as well."""
    base: Any = unwrap(shape.model)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is embedding
    return [weight for weight in wide if weight.requires_grad and (is_tied or weight is not embedding)]


def _head_bytes(shape: Shape) -> int:
    head: torch.nn.Module | None = unwrap(shape.model).get_output_embeddings()
    return 0 if head is None else sum(weight.nbytes for weight in head.parameters())


def without_wide_gradients(trace: Trace, shape: Shape, wide: "list[nn.Parameter]", num_processes: int) -> Trace:
    """At the end of the backward pass a process has its part of the gradients of the vocabulary."""
    shared = surplus_bytes(_with_shared_gradients(shape, wide), num_processes)
    return replace(trace, late_bytes=max(trace.late_bytes - shared, 0))
