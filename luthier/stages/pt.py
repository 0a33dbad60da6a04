"""(Continued) pre-training: next-token cross-entropy on every token of plain text.

All texts are laid behind one another, each closed by the end-of-text token, and cut into blocks of `cutoff_len` tokens;
with `packing: false` every text is a row of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, Rules, within
from luthier.core.errors import RowError
from luthier.data.rows.row_plan import RowPlan
from luthier.data.types import Dialogue, Prompt
from luthier.model.types import Models
from luthier.stages import LossOutput, Reporting, Stage, StageState
from luthier.stages._causal import count_targets, next_token_loss

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.packing.blocks import Blocks
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.labels import Encoded
    from luthier.data.rows.tokenize import Written


@dataclass(frozen=True, slots=True, kw_only=True)
class PtConfig:
    label_smoothing_factor: float = 0.0
    """Share of each target that is spread evenly over the vocabulary."""


RULES = Rules(
    (
        within("method", "label_smoothing_factor", 0, 1, or_high=False),
        Rule(
            ("predict_with_generate", "stage"),
            "writes answers, and plain text has no questions",
            "leave it out, or use stage: sft",
            lambda run: run.training["predict_with_generate"],
        ),
        Rule(
            ("do_predict", "stage"),
            "writes answers, and plain text has no questions",
            "use do_eval: true for the perplexity, or stage: sft",
            lambda run: run.training["do_predict"],
        ),
        Rule(
            ("neat_packing", "stage"),
            "keeps packed conversations apart, and this stage cuts plain texts into blocks",
            "leave it out",
            lambda run: run.data.neat_packing,
        ),
    )
)


def write(example: Dialogue | Prompt, encoding: "Encoding", config: PtConfig) -> "Sequence[tuple[Written]]":
    """The text of the first message with the end-of-text token."""
    from luthier.data.chat.render import Turn

    text = example.messages[0].content
    if not text:
        raise RowError("the text is empty")
    return [((Turn((), (text + encoding.end_of_text,)),),)]


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", config: PtConfig) -> "tuple[Encoded]":
    """Every token is learned."""
    from luthier.data.rows.labels import Encoded

    (((_, ids),),) = parts
    kept = ids[: encoding.cutoff_len]
    lost = len(ids) - len(kept)
    return (Encoded(kept, list(kept), lost_tokens=lost, lost_labels=lost, lost_terminator=lost > 0),)


def packer(run: "TrainRun", encoding: "Encoding") -> "Blocks | None":
    from luthier.data.packing.blocks import Blocks

    if run.data.packing is False:
        return None
    # The reference takes one token off when `packing: true` is written out, and none when it is left to the stage.
    size = run.data.cutoff_len - (1 if run.data.packing else 0)
    return Blocks(size, encoding.leading_bos)


def loss(
    models: Models, batch: Mapping[str, Any], config: PtConfig, *, state: StageState, training: bool
) -> LossOutput:
    return next_token_loss(models, batch, label_smoothing=config.label_smoothing_factor if training else 0.0)


def perplexity(means: Mapping[str, float]) -> Mapping[str, float]:
    """exp(loss) of an evaluation: every token of the text is learned, so it is that of the text."""
    return {"perplexity": math.exp(means["loss"])} if "loss" in means else {}


STAGE = Stage(
    name="pt",
    config=PtConfig,
    rows=RowPlan(examples=(Prompt, Dialogue), reads_chat=False, write=write, label=label, packer=packer),
    units=count_targets,
    loss=loss,
    reporting=Reporting(headline=("perplexity",), derived=perplexity),
    check=RULES,
)
