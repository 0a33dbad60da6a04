"""Conversations for a student (gkd): those of sft, or prompts with a last answer where the student writes its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.data.media.tokens import first_whole
from luthier.data.plans import dialogues
from luthier.data.rows.labels import IGNORE_INDEX, Encoded
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.types import Dialogue

if TYPE_CHECKING:
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.media.expand import Seen
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.tokenize import Written


def settings(method: Any) -> RowSettings:
    return replace(dialogues.settings(method), own_answers=method.gkd_lambda > 0)


def write(example: Dialogue, encoding: "Encoding", settings: RowSettings) -> "Sequence[tuple[Written]]":
    """Every turn of the conversation, or the last one, with a prompt as a server sends it."""
    if settings.own_answers:
        return [(encoding.written_apart(example),)]
    return dialogues.write(example, encoding, settings)


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", settings: RowSettings) -> tuple[Encoded]:
    """A prompt that the student answers is never truncated: its end asks for the answer."""
    if not settings.own_answers:
        return dialogues.label(parts, encoding, settings)
    (((prompt, answer),),) = parts
    whole = [*answer, *([] if encoding.closing_eos is None else [encoding.closing_eos])]
    room = len(whole) if encoding.cutoff_len is None else encoding.cutoff_len - len(prompt)
    if room <= 0:
        raise RowError(f"the prompt alone fills cutoff_len {encoding.cutoff_len}")
    kept = first_whole(whole, room)
    num_lost = len(whole) - len(kept)
    labels = [IGNORE_INDEX] * len(prompt) + kept
    return (Encoded([*prompt, *kept], labels, num_lost, num_lost, lost_terminator=num_lost > 0),)


def weigh(
    example: Dialogue,
    written: "Sequence[Written]",
    turns: "Sequence[list[TurnIds]]",
    encoding: "Encoding",
    settings: RowSettings,
    seen: "Seen | None" = None,
) -> list[Encoded]:
    if settings.own_answers:
        raise RowError('a message carries "loss", which answers of the student\'s own (gkd_lambda) do not have')
    return dialogues.weigh(example, written, turns, encoding, settings, seen)


DISTILLATION = RowPlan(
    name="distillation",
    examples=(Dialogue,),
    settings=settings,
    write=write,
    label=label,
    weigh=weigh,
    packer=dialogues.packer,
)
