"""What a training stage is. Each other file in this folder is one stage; its file name is its YAML name.

A stage is a value: the one workflow (`luthier.run.train`) and the one trainer (`luthier.training.trainer`) take it as
it is, and never ask for its name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.core.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.config.runs import TrainRun
    from luthier.data.encode import TurnIds
    from luthier.data.encoding import Encoding
    from luthier.data.labels import Encoded
    from luthier.data.packing import Packer
    from luthier.data.tokenise import Written


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Numbers not yet divided, so that a loss does not depend on how an optimizer step was cut into batches."""

    total: "Tensor"
    """Scalar: the sum of the loss over the units of this batch."""
    metrics: Mapping[str, tuple["Tensor", int]] = field(default_factory=dict)
    """Name -> (sum, count) of what is logged beside the loss."""


def no_problems(run: "TrainRun") -> Iterable[Problem]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training method. Features are plain dicts of integer lists; a batch is a dict of tensors."""

    name: str
    config: type
    """The YAML keys that only this stage understands."""
    examples: tuple[type, ...]
    """The example types it takes; a row that gives another is dropped with the reason."""
    reads_chat: bool = True
    """Whether rows are conversations, so that a chat format is needed."""
    learns_all: bool = False
    """Whether every token is learned, so that exp(loss) is the perplexity of the text and worth reporting."""
    write: "Callable[[Any, Encoding, Any], Sequence[Written]]"
    """(example, encoding, config) -> rows to tokenise: one, unless a chat template shows answers after other histories.

    Raises `RowError` for an example that cannot be used."""
    label: "Callable[[list[TurnIds], Encoding, Any], Encoded]"
    """(turns of a row, encoding, config) -> the row: what is learned of it, within `cutoff_len`."""
    packer: "Callable[[TrainRun, Encoding], Packer | None]" = lambda run, encoding: None
    """Joins tokenised rows into longer ones (the blocks of pt, the packs of sft), or None."""
    units: Callable[[Mapping[str, Any]], int]
    """How many units (labelled tokens, pairs, ...) the loss of this batch sums over."""
    loss: Callable[..., LossOutput]
    """(models, batch, config, *, training) -> LossOutput."""
    check: "Callable[[TrainRun], Iterable[Problem]]" = no_problems
    """Rules between keys that concern this stage; runs before torch is imported."""
