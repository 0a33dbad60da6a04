"""What rm and dpo share: rows of a better and a worse answer to the same prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, is_set
from luthier.core.errors import RowError
from luthier.data.rows.row_plan import RowPlan
from luthier.data.types import Dialogue, Preference
from luthier.stages._logps import num_targets

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.chat.encoder import TurnIds
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.labels import Encoded
    from luthier.data.rows.tokenize import Written


def write(example: Preference, encoding: "Encoding", config: Any) -> "Sequence[tuple[Written, Written]]":
    """Both answers, each after the prompt that a server would send."""
    if example.chosen.content == example.rejected.content:
        raise RowError("the chosen and the rejected answer are the same")
    if not example.chosen.content.strip():
        raise RowError("the chosen answer is empty")
    chosen, rejected = (
        encoding.written_last(Dialogue((*example.prompt, answer), example.system, example.tools, example.media))
        for answer in (example.chosen, example.rejected)
    )
    return [(chosen, rejected)]


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", config: Any) -> "tuple[Encoded, ...]":
    """Both answers are learned, within one budget."""
    from luthier.data.rows.labels import label_answers

    answers = [turn for (turn,) in parts]
    chosen, rejected = label_answers(answers, cutoff_len=encoding.cutoff_len, eos_token_id=encoding.closing_eos)
    if chosen.input_ids == rejected.input_ids:
        raise RowError(f"the two answers are the same up to cutoff_len {encoding.cutoff_len}")
    return chosen, rejected


PAIRS = RowPlan(examples=(Preference,), parts=("chosen_", "rejected_"), write=write, label=label)


@dataclass(frozen=True, slots=True)
class ChosenRejected:
    """A number for each sequence of a batch, taken apart."""

    chosen: "Tensor"
    rejected: "Tensor"


def halves(values: "Tensor") -> ChosenRejected:
    """(2 P,) -> twice (P,): a batch of P pairs has first all chosen sequences, then all rejected ones."""
    return ChosenRejected(*values.chunk(2))


def not_filler(batch: Mapping[str, Any]) -> "Tensor":
    """(P,) false for a pair that only fills a batch up: nothing of it is learned."""
    return num_targets(batch).chunk(2)[0] > 0


def count_pairs(batch: Mapping[str, Any]) -> int:
    return int(not_filler(batch).sum())


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
