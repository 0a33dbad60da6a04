"""Answers that somebody liked or disliked, each with the tag `kto_tags` (kto)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from luthier.core.errors import RowError
from luthier.data.chat.answers import flat_text
from luthier.data.packing.kl_pairs import MismatchedPairs
from luthier.data.rows.closing_marks import closing_marks
from luthier.data.rows.labels import Encoded, label_answers
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.types import Dialogue, Feedback

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.tokenize import Written


def write(example: Feedback, encoding: "Encoding", settings: RowSettings) -> "Sequence[tuple[Written]]":
    """The last answer after the prompt that a server would send."""
    if example.liked and not flat_text(example.messages[-1], with_thought=True).strip():
        raise RowError("the liked answer is empty")
    dialogue = Dialogue(example.messages, example.system, example.tools, example.media)
    return [(encoding.written_last(dialogue),)]


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", settings: RowSettings) -> tuple[Encoded, ...]:
    ((answer,),) = parts
    return label_answers(
        [answer],
        cutoff_len=encoding.cutoff_len,
        eos_token_id=encoding.closing_eos,
        num_marks=encoding.num_marks,
    )


def packer(run: "TrainRun", encoding: "Encoding") -> MismatchedPairs:
    marks = closing_marks(encoding.encoder, encoding.template, encoding.model_template)
    return MismatchedPairs(run.data.cutoff_len, marks)


def one_sided(counts: Mapping[str, Counter[int]]) -> tuple[str, str] | None:
    """Answers that are all liked or all disliked: no answer shows the difference that the rewards are to learn."""
    liked, disliked = counts["kto_tags"][1], counts["kto_tags"][0]
    if bool(liked) == bool(disliked):
        return None
    missing = "disliked" if liked else "liked"
    what = f"kto_tag: {liked} training rows are liked and {disliked} disliked, and kto learns what distinguishes them"
    return what, f"add {missing} answers, or check the column that holds the tag"


FEEDBACK = RowPlan(
    name="feedback",
    examples=(Feedback,),
    tags={"kto_tags": lambda example: int(example.liked)},
    one_sided=one_sided,
    write=write,
    label=label,
    packer=packer,
)
