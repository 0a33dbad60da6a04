"""Parameter groups: one per kind of weight, each split by whether weight decay applies."""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import TrainingArguments

NOT_DECAYING = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names of weights without weight decay, as in transformers."""


def parameter_groups(
    model: "nn.Module", weight_decay: float, kind_of: "Callable[[str, nn.Parameter], Hashable]" = lambda name, p: None
) -> dict[Any, list[dict[str, Any]]]:
    """Kind -> one or two groups of its trainable parameters. Of two, only the first has weight decay."""
    from torch import nn
    from transformers.trainer_pt_utils import get_parameter_names

    decaying = set(get_parameter_names(model, [nn.LayerNorm], list(NOT_DECAYING)))
    found: dict[Any, dict[bool, list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = found.setdefault(kind_of(name, parameter), {True: [], False: []})
            kind[name in decaying].append(parameter)
    return {
        kind: [
            {"params": members, "weight_decay": weight_decay if decays else 0.0}
            for decays, members in by_decay.items()
            if members
        ]
        for kind, by_decay in found.items()
    }


def base_optimizer(model: "nn.Module", args: "TrainingArguments") -> "Callable[[list[dict[str, Any]]], Optimizer]":
    """Groups -> the optimizer of `optim`, with its keys from `args`."""
    from transformers import Trainer

    from luthier.training.optimizers._states import HAS_NO_KERNEL, StatesAlone

    if args.optim in HAS_NO_KERNEL and all(weight.is_meta for weight in model.parameters()):
        return lambda groups: StatesAlone(groups, optim=args.optim, lr=args.learning_rate)
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    return lambda groups: kind(groups, **kwargs)
