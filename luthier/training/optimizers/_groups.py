"""Parameters in groups: each kind of weight apart, and in each kind what decays apart from what does not."""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import TrainingArguments

NOT_DECAYING = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names of weights that do not decay, as in transformers."""


def parameter_groups(
    model: "nn.Module", weight_decay: float, kind_of: "Callable[[str, nn.Parameter], Hashable]" = lambda name, p: None
) -> dict[Any, list[dict[str, Any]]]:
    """Kind -> its one or two groups of the parameters that learn; only the first decays if there are two."""
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
            for decays, members in halves.items()
            if members
        ]
        for kind, halves in found.items()
    }


def base_optimizer(model: "nn.Module", args: "TrainingArguments") -> "Callable[[list[dict[str, Any]]], Optimizer]":
    """Groups -> the optimizer that `optim` names, with the keys that it reads."""
    from transformers import Trainer

    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    return lambda groups: kind(groups, **kwargs)
