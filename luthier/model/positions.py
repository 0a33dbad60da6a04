"""Positions of tokens on several axes (M-RoPE), as Qwen2-VL and its relatives count them.

A token of text has the same position on all axes. The tokens of an image have a time, a height and a width, and the
text after it goes on behind the largest of them. The class of the model computes this (`get_rope_index`) from ids and
sizes, and needs no weights for it.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class RopeIndex:
    """The positions of padded rows. It can be sent to the worker processes of a data loader."""

    kind: type
    """The class of the model with `get_rope_index`."""
    config: "PreTrainedConfig"

    def __call__(self, inputs: Mapping[str, Any]) -> "Tensor":
        """(axes, S, L) for `input_ids` and `attention_mask` (S, L), the types of these tokens and the sizes of images.

        Positions of padding are 0.
        """
        from torch import nn

        shell: Any = self.kind.__new__(self.kind)  # type: ignore[call-overload]
        nn.Module.__init__(shell)
        shell.config = self.config
        names = inspect.signature(shell.get_rope_index).parameters
        positions, _ = shell.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
        return positions


def rope_index_of(base: "PreTrainedModel") -> RopeIndex | None:
    """None for a model whose positions have one axis."""
    owners = (module for module in base.modules() if hasattr(type(module), "get_rope_index"))
    owner: Any = next(owners, None)
    return None if owner is None else RopeIndex(type(owner), owner.config)
