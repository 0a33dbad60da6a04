"""What rm and dpo share: rows with a chosen and a rejected answer to the same prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, is_set
from luthier.stages._logps import num_targets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ChosenRejected:
    """One number per sequence of a batch, split into chosen and rejected, (P,) each."""

    chosen: "Tensor"
    rejected: "Tensor"


def halves(values: "Tensor") -> ChosenRejected:
    """(2 P,) -> (P,) and (P,): a batch of P pairs holds all chosen sequences, then all rejected ones."""
    return ChosenRejected(*values.chunk(2))


def not_filler(batch: Mapping[str, Any]) -> "Tensor":
    """(P,) false for filler pairs, which have no labeled tokens."""
    return num_targets(batch).chunk(2)[0] > 0


def count_pairs(batch: Mapping[str, Any]) -> int:
    return int(not_filler(batch).sum())


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
LOGPS = ("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")
"""Metrics of better and worse answers."""

NO_SPLIT = Rule(
    ("on_overlong", "stage"),
    "cuts a row into several, and two answers could not be cut at the same place",
    "set on_overlong: truncate, drop or error",
    lambda run: run.data.on_overlong == "split",
)
NO_PACKING = tuple(
    Rule(
        (key, "stage"),
        "joins conversations of stage sft; rows of this stage are concatenated without padding anyway",
        "leave it out",
        is_set("data", key),
    )
    for key in ("packing", "neat_packing")
)
NO_ANSWERS = Rule(
    ("predict_with_generate", "stage"),
    "writes answers and compares them with given ones, which is for stage sft",
    "leave it out, or use stage: sft",
    is_set("training", "predict_with_generate"),
)
