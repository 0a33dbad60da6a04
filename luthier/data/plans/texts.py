"""Plain texts, each ended by the end-of-text token (pt).

The texts are concatenated and cut into blocks of `cutoff_len` tokens; with `packing: false` every text is a row of its
own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.core.errors import RowError
from luthier.data.packing.blocks import Blocks
from luthier.data.rows.labels import Encoded
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.types import Dialogue, Prompt

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.tokenize import Written


def write(example: Dialogue | Prompt, encoding: "Encoding", settings: RowSettings) -> "Sequence[tuple[Written]]":
    """The text of the first message with the end-of-text token."""
    from luthier.data.chat.render import Turn

    text = example.messages[0].content
    if not text:
        raise RowError("the text is empty")
    return [((Turn((), (text + encoding.end_of_text,)),),)]


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", settings: RowSettings) -> tuple[Encoded]:
    """Every token is a target."""
    (((_, ids),),) = parts
    kept = ids[: encoding.cutoff_len]
    lost = len(ids) - len(kept)
    return (Encoded(kept, list(kept), lost_tokens=lost, lost_labels=lost, lost_terminator=lost > 0),)


def packer(run: "TrainRun", encoding: "Encoding") -> Blocks | None:
    if run.data.packing is False:
        return None
    # As in LLaMA-Factory: one token less when `packing: true` is given, none when it is the default of the stage.
    size = run.data.cutoff_len - (1 if run.data.packing else 0)
    return Blocks(size, encoding.leading_bos)


TEXTS = RowPlan(name="texts", examples=(Prompt, Dialogue), reads_chat=False, write=write, label=label, packer=packer)
