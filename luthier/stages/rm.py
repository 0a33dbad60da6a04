"""Reward modeling: the chosen answer to a prompt should score higher than the rejected one.

With r(x, y) the score of the answer y to x, taken at its last token, and y_w chosen, y_l rejected (Bradley and Terry;
https://arxiv.org/abs/2203.02155, eq. 1, without its division by the number of pairs of a prompt):

    loss = -log sigmoid(r(x, y_w) - r(x, y_l))

P pairs in a batch: first all chosen sequences, then all rejected ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.config.rules.engine import Rules, is_set, warning
from luthier.data.collate import model_inputs
from luthier.data.plans.pairs import PAIRS
from luthier.model.types import Models
from luthier.stages import LossOutput, Reporting, Stage, StageState
from luthier.stages._pairs import (
    NO_ANSWERS,
    NO_PACKING,
    NO_SPLIT,
    REWARDS,
    ChosenRejected,
    count_pairs,
    halves,
    not_filler,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RmConfig:
    """Keys that only `stage: rm` reads: none."""


RULES = Rules(
    (
        NO_SPLIT,
        *NO_PACKING,
        NO_ANSWERS,
        warning(
            ("upcast_lmhead_output", "stage"),
            "is about the logits of the vocabulary, and a reward model has none",
            "leave it out",
            is_set("model", "upcast_lmhead_output"),
        ),
    )
)


def scores(models: Models, batch: Mapping[str, Any]) -> ChosenRejected:
    """The scores of the chosen and of the rejected answers, (P,) each, float32."""
    from luthier.model.heads.score_head import position_scores

    return halves(position_scores(models.policy, model_inputs(batch), models.head.score)[batch["ends"]])


def loss(
    models: Models, batch: Mapping[str, Any], config: RmConfig, *, state: StageState, training: bool
) -> LossOutput:
    """The sum over the pairs of a batch."""
    from torch.nn.functional import logsigmoid

    rewards = scores(models, batch)
    is_real = not_filler(batch)
    real, count = is_real.to(rewards.chosen.dtype), is_real.sum()
    margins = rewards.chosen - rewards.rejected
    metrics = {
        "accuracy": margins > 0,
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/margins": margins,
    }
    sums = {name: ((values.detach() * real).sum(), count) for name, values in metrics.items()}
    return LossOutput(-(logsigmoid(margins) * real).sum(), sums)


def predict(models: Models, batch: Mapping[str, Any], config: RmConfig) -> list[dict[str, Any]]:
    """The scores of each pair, to two decimals."""
    rewards = scores(models, batch)
    pairs = zip(rewards.chosen.tolist(), rewards.rejected.tolist(), strict=True)
    return [{"chosen": round(chosen, 2), "rejected": round(rejected, 2)} for chosen, rejected in pairs]


STAGE = Stage(
    name="rm",
    config=RmConfig,
    rows=PAIRS,
    head="score",
    units=count_pairs,
    loss=loss,
    reporting=Reporting(
        headline=("accuracy", "rewards/margins"), evaluated=lambda config: ("accuracy", *REWARDS), predict=predict
    ),
    check=RULES,
)
