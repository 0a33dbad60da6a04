"""KTO: learning from answers that somebody liked or disliked, each on its own (https://arxiv.org/abs/2402.01306).

N rows of a batch. With pi the policy, r the reference and d = log pi(y | x) - log r(y | x) (eq. 7 and 8):

    liked      w_c (1 - s(beta (d - KL)))        disliked   w_r (1 - s(beta (KL - d)))

KL = max(0, mean d of the mismatched pairs), answers after prompts that they do not belong to
(`luthier.data.packing.kl_pairs`), over the whole optimizer step, or the whole evaluation set, and without gradient.
`pref_ftx` adds to each liked row that many times the mean over its tokens of -log pi.

A batch holds 2 N sequences: the answers, then the strangers.
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
from luthier.stages._pairs import NO_ANSWERS, NO_PACKING
from luthier.stages._reference import NO_DROPOUT, NO_PREDICTIONS, ReferenceConfig, of_reference, reference_model

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True, kw_only=True)
class KtoConfig(ReferenceConfig):
    pref_beta: float = 0.1
    """Strength of the pull towards the reference model."""
    pref_ftx: float = 0.0
    """Weight of the plain sft loss on the liked answers, added to the preference loss."""
    kto_chosen_weight: float = 1.0
    """Weight of liked answers."""
    kto_rejected_weight: float = 1.0
    """Weight of disliked answers."""


def has_reference(run: "TrainRun") -> bool:
    return True


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
        *of_reference(has_reference),
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
    """Without those that only fill a batch up."""
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
        count = float(rows.sum())
        shown = {"rewards": config.pref_beta * ratios, "logps": logps.sums, "logits": logps.mean_logits}
        metrics |= {f"{name}/{side}": ((value.detach() * rows).sum(), count) for name, value in shown.items()}
    count = float(not_filler.sum())
    metrics["kl"] = (torch.tensor(kl * count), count)
    return LossOutput((losses * not_filler).sum(), metrics)


def margins(means: Mapping[str, float]) -> Mapping[str, float]:
    """How much more reward liked answers have, if there were answers of both kinds."""
    chosen, rejected = means.get("rewards/chosen"), means.get("rewards/rejected")
    return {} if chosen is None or rejected is None else {"rewards/margins": chosen - rejected}


def sums(models: Models, batch: Mapping[str, Any], config: KtoConfig, *, state: StageState) -> Sums:
    """How much more likely than the reference the policy finds the strangers."""
    mismatched = mismatched_of(batch)
    logps = sequence_logps(models, mismatched)
    not_filler = logps.lengths > 0
    return {"kl": (((logps.sums - mismatched["reference_logps"]) * not_filler).sum(), float(not_filler.sum()))}


def update(state: StageState, means: Mapping[str, tuple[float, float]], config: KtoConfig) -> StageState:
    return {"kl": max(means["kl"][0], 0.0)}


def frozen_models(run: "TrainRun") -> tuple[FrozenModelSpec, ...]:
    return (reference_model(run.method, is_cached=True),) if has_reference(run) else ()


STAGE = Stage(
    name="kto",
    config=KtoConfig,
    rows=FEEDBACK,
    frozen_models=frozen_models,
    has_dropout=False,
    units=count_rows,
    loss=loss,
    statistics=StepStatistics(sums=sums, update=update),
    reporting=Reporting(headline=("rewards/margins", "kl"), derived=margins),
    check=RULES,
)
