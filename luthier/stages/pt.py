"""(Continued) pre-training: next-token cross-entropy on every token of plain text.

Texts are concatenated, each followed by the end-of-text token, and cut into blocks of `cutoff_len` tokens. With
`packing: false` every text is its own row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.config.rules.engine import Rule, Rules, is_set, within
from luthier.data.plans.texts import TEXTS
from luthier.model.types import Models
from luthier.stages import LossOutput, Reporting, Stage, StageState
from luthier.stages._causal import count_targets, next_token_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class PtConfig:
    label_smoothing_factor: float = 0.0
    """Share of each target that is spread evenly over the vocabulary."""


RULES = Rules(
    (
        within("method", "label_smoothing_factor", 0, 1, or_high=False),
        Rule(
            ("cutoff_len", "stage"),
            "leaves blocks of one token, and a token is predicted from those before it",
            "set it to 2 or more, e.g. 2048",
            lambda run: run.data.cutoff_len == 1,
        ),
        Rule(
            ("predict_with_generate", "stage"),
            "writes answers, and plain text has no questions",
            "leave it out, or use stage: sft",
            is_set("training", "predict_with_generate"),
        ),
        Rule(
            ("do_predict", "stage"),
            "writes answers, and plain text has no questions",
            "use do_eval: true for the perplexity, or stage: sft",
            is_set("training", "do_predict"),
        ),
        Rule(
            ("neat_packing", "stage"),
            "keeps packed conversations apart, and this stage cuts plain texts into blocks",
            "leave it out",
            is_set("data", "neat_packing"),
        ),
    )
)


def loss(
    models: Models, batch: Mapping[str, Any], config: PtConfig, *, state: StageState, training: bool
) -> LossOutput:
    return next_token_loss(models, batch, label_smoothing=config.label_smoothing_factor if training else 0.0)


def perplexity(means: Mapping[str, float]) -> Mapping[str, float]:
    """exp(loss) of an evaluation. Every token is labeled, so this is the perplexity of the text."""
    return {"perplexity": perplexity_at(means["loss"])} if "loss" in means else {}


def perplexity_at(loss: float) -> float:
    """exp(loss); infinite for a loss above 709, which a model that has diverged reaches."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


STAGE = Stage(
    name="pt",
    config=PtConfig,
    rows=TEXTS,
    reads="cross_entropy",
    units=count_targets,
    loss=loss,
    reporting=Reporting(headline=("perplexity",), derived=perplexity, evaluated=lambda config: ("perplexity",)),
    check=RULES,
    supports_router_loss=True,
    supports_skipped_tokens=True,
)
