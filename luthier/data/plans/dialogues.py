"""Conversations with their answers as targets (sft)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.data.packing.best_fit import Packs
from luthier.data.rows.labels import Encoded, label_turns
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.types import Dialogue

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.media.expand import Seen
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.tokenize import Written


def settings(method: Any) -> RowSettings:
    return RowSettings(train_on_prompt=method.train_on_prompt, mask_history=method.mask_history)


def write(example: Dialogue, encoding: "Encoding", settings: RowSettings) -> "Sequence[tuple[Written]]":
    """Every turn of the conversation, or those of the row with the last answer if no other one is learned."""
    return [(row,) for row in encoding.written(example, keep_past_thinking=not settings.mask_history)]


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", settings: RowSettings) -> tuple[Encoded]:
    """The answers are targets; the prompts are not, unless `train_on_prompt`."""
    (turns,) = parts
    row = label_turns(
        turns,
        cutoff_len=encoding.cutoff_len,
        train_on_prompt=settings.train_on_prompt,
        mask_history=settings.mask_history,
        eos_token_id=encoding.closing_eos,
        num_marks=encoding.num_marks,
    )
    return (row,)


def weigh(
    example: Dialogue,
    written: "Sequence[Written]",
    turns: "Sequence[list[TurnIds]]",
    encoding: "Encoding",
    settings: RowSettings,
    seen: "Seen | None" = None,
) -> list[Encoded]:
    """What the messages themselves say takes precedence over `train_on_prompt` and `mask_history`."""
    from luthier.data.rows.loss_weights import weighted_rows

    return weighted_rows(
        example,
        written,
        turns,
        encoding,
        train_on_prompt=settings.train_on_prompt,
        mask_history=settings.mask_history,
        seen=seen,
    )


def packer(run: "TrainRun", encoding: "Encoding") -> Packs | None:
    return Packs(run.data.cutoff_len) if run.data.packing or run.data.neat_packing else None


DIALOGUES = RowPlan(
    name="dialogues", examples=(Dialogue,), settings=settings, write=write, label=label, weigh=weigh, packer=packer
)
