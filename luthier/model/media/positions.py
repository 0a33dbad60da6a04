"""Positions of tokens on several axes (M-RoPE), as Qwen2-VL and its relatives count them.

A token of text has the same position on all axes. The tokens of an image have a time, a height and a width, and the
text after it goes on behind the largest of them. The class of the model computes this (`get_rope_index`) from ids and
sizes, and needs no weights for it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_DERIVED: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "audio_seqlens": ("feature_attention_mask", lambda mask: mask.sum(-1)),
    "second_per_grids": ("video_second_per_grid", lambda seconds: seconds),
}
"""Argument of Qwen-Omni's function -> (input of its model, how it follows from that)."""


@dataclass(frozen=True, slots=True)
class RopeIndex:
    """The positions of padded rows. It can be sent to the worker processes of a data loader."""

    kind: type
    """The class of the model with `get_rope_index`."""
    config: "PreTrainedConfig"
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Attributes of the model that this function reads beside its config."""

    def __call__(self, inputs: Mapping[str, Any]) -> "Tensor":
        """(axes, S, L) for `input_ids` and `attention_mask` (S, L), the types of these tokens and the sizes of items.

        Positions of padding are 0.
        """
        from torch import nn

        shell: Any = self.kind.__new__(self.kind)  # type: ignore[call-overload]
        nn.Module.__init__(shell)
        shell.config = self.config
        for name, value in self.numbers.items():
            setattr(shell, name, value)
        names = inspect.signature(shell.get_rope_index).parameters
        given = {**inputs, **{name: take(inputs[own]) for name, (own, take) in _DERIVED.items() if own in inputs}}
        positions, _ = shell.get_rope_index(**{name: given[name] for name in names if name in given})
        return positions


def rope_index_of(base: "PreTrainedModel") -> RopeIndex | None:
    """None for a model whose positions have one axis."""
    owners = (module for module in base.modules() if hasattr(type(module), "get_rope_index"))
    owner: Any = next(owners, None)
    if owner is None:
        return None
    numbers = {name: value for name, value in vars(owner).items() if isinstance(value, int) and name[0] != "_"}
    return RopeIndex(type(owner), owner.config, numbers)
