"""KTO: training on single answers marked as liked or disliked (https://arxiv.org/abs/2402.01306).

N rows in a batch. With pi the policy, r the reference and d = log pi(y | x) - log r(y | x) (eq. 7 and 8):

    liked      w_c (1 - s(beta (d - KL)))        disliked   w_r (1 - s(beta (KL - d)))

KL = max(0, mean d of the mismatched pairs), which put an answer after another row's prompt
(`luthier.data.packing.kl_pairs`). The mean is over the whole optimizer step or evaluation set, without gradient.
`pref_ftx` times the mean of -log pi over the answer tokens is added to each liked row.

A batch holds 2 N sequences: the answers, then the mismatched pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, Rules, above, at_least
from luthier.data.collate import sequences
from luthier.data.plans.feedback import FEEDBACK
from luthier.model.types import Models
from luthier.stages import FrozenModelSpec, LossOutput, Reporting, Stage, StageState, StepStatistics, Sums
from luthier.stages._logps import num_targets, sequence_logps
from luthier.stages._pairs import LOGPS, NO_ANSWERS, NO_PACKING, REWARDS
from luthier.stages._reference import NO_DROPOUT, NO_PREDICTIONS, ReferenceConfig, of_reference, reference_model

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True, kw_only=True)
class KtoConfig(ReferenceConfig):
    pref_beta: float = 0.1
    """Strength of the regularization towards the reference model."""
    pref_ftx: float = 0.0
    """Weight of the plain sft loss on the liked answers, added to the preference loss."""
    kto_chosen_weight: float = 1.0
    """Weight of liked answers."""
    kto_rejected_weight: float = 1.0
    """Weight of disliked answers."""


RULES = Rules(
    (
        Rule(
            ("on_overlong", "stage"),
            "cuts a row into several, and somebody liked or disliked the whole answer",
            "set on_overlong: truncate, drop or error",
            lambda run: run.data.on_overlong == "split",
        ),
        *NO_PACKING,
        NO_ANSWERS,
        NO_PREDICTIONS,
        NO_DROPOUT,
        *of_reference(lambda run: True),
        above("method", "pref_beta", 0),
        at_least("method", "pref_ftx", 0),
        at_least("method", "kto_chosen_weight", 0),
        at_least("method", "kto_rejected_weight", 0),
    )
)


def answers_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {**sequences(batch, 0, _num_rows(batch)), "reference_logps": batch["reference_logps"].chunk(2)[0]}


def mismatched_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    num_rows = _num_rows(batch)
    later = sequences(batch, num_rows, 2 * num_rows)
    return {**later, "reference_logps": batch["reference_logps"].chunk(2)[1]}


def _num_rows(batch: Mapping[str, Any]) -> int:
    return batch["kto_tags"].numel()


def count_rows(batch: Mapping[str, Any]) -> int:
    """The number of rows without fillers."""
    return int((num_targets(batch).chunk(2)[0] > 0).sum())


def loss(
    models: Models, batch: Mapping[str, Any], config: KtoConfig, *, state: StageState, training: bool
) -> LossOutput:
    """The sum over the rows of a batch."""
    import torch

    answers, liked, kl = answers_of(batch), batch["kto_tags"] > 0, state["kl"]
    logps = sequence_logps(models, answers)
    ratios = logps.sums - answers["reference_logps"]
    gain = torch.where(liked, ratios - kl, kl - ratios)
    weights = torch.where(liked, config.kto_chosen_weight, config.kto_rejected_weight).to(gain.dtype)
    losses = weights * (1 - (config.pref_beta * gain).sigmoid())
    if config.pref_ftx:
        losses = losses - config.pref_ftx * liked * logps.sums / logps.lengths.clamp(min=1)
    not_filler = logps.lengths > 0
    metrics: dict[str, Any] = {}
    for side, rows in (("chosen", liked & not_filler), ("rejected", ~liked & not_filler)):
        count = rows.sum()
        per_row = {"rewards": config.pref_beta * ratios, "logps": logps.sums, "logits": logps.mean_logits}
        metrics |= {f"{name}/{side}": ((value.detach() * rows).sum(), count) for name, value in per_row.items()}
    count = not_filler.sum()
    metrics["kl"] = (kl * count, count)
    return LossOutput((losses * not_filler).sum(), metrics)


def margins(means: Mapping[str, float]) -> Mapping[str, float]:
    """The mean reward of liked answers minus that of disliked ones, if there are both."""
    chosen, rejected = means.get("rewards/chosen"), means.get("rewards/rejected")
    return {} if chosen is None or rejected is None else {"rewards/margins": chosen - rejected}


def sums(models: Models, batch: Mapping[str, Any], config: KtoConfig, *, state: StageState) -> Sums:
    """The log-ratios of the mismatched pairs between policy and reference."""
    mismatched = mismatched_of(batch)
    logps = sequence_logps(models, mismatched)
    not_filler = logps.lengths > 0
    return {"kl": (((logps.sums - mismatched["reference_logps"]) * not_filler).sum(), not_filler.sum())}


def update(state: StageState, means: Mapping[str, tuple[float, float]], config: KtoConfig) -> StageState:
    return {"kl": max(means["kl"][0], 0.0)}


def frozen_models(run: "TrainRun") -> tuple[FrozenModelSpec, ...]:
    return (reference_model(run.method, is_cached=True),)


STAGE = Stage(
    name="kto",
    config=KtoConfig,
    rows=FEEDBACK,
    frozen_models=frozen_models,
    num_learned_parts=1,
    has_dropout=False,
    units=count_rows,
    loss=loss,
    statistics=StepStatistics(sums=sums, update=update),
    reporting=Reporting(
        headline=("rewards/margins", "kl"), derived=margins, evaluated=lambda config: (*REWARDS, *LOGPS, "kl")
    ),
    check=RULES,
)
