"""A better and a worse answer to the same prompt (rm, dpo)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.core.errors import RowError
from luthier.data.chat.answers import flat_text
from luthier.data.rows.labels import Encoded, label_answers
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.types import Dialogue, Preference

if TYPE_CHECKING:
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.tokenize import Written


def write(example: Preference, encoding: "Encoding", settings: RowSettings) -> "Sequence[tuple[Written, Written]]":
    """Both answers, each after the prompt that a server would send."""
    texts = [flat_text(answer, with_thought=True) for answer in (example.chosen, example.rejected)]
    if texts[0] == texts[1]:
        raise RowError("the chosen and the rejected answer are the same")
    if not texts[0].strip():
        raise RowError("the chosen answer is empty")
    chosen, rejected = (
        encoding.written_last(Dialogue((*example.prompt, answer), example.system, example.tools, example.media))
        for answer in (example.chosen, example.rejected)
    )
    return [(chosen, rejected)]


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", settings: RowSettings) -> tuple[Encoded, ...]:
    """Both answers are targets, within one budget."""
    answers = [turn for (turn,) in parts]
    chosen, rejected = label_answers(
        answers,
        cutoff_len=encoding.cutoff_len,
        eos_token_id=encoding.closing_eos,
        num_marks=encoding.num_marks,
    )
    if chosen.input_ids == rejected.input_ids:
        raise RowError(f"the two answers are the same up to cutoff_len {encoding.cutoff_len}")
    return chosen, rejected


PAIRS = RowPlan(name="pairs", examples=(Preference,), parts=("chosen_", "rejected_"), write=write, label=label)
