"""Direct preference optimisation and its relatives: a better and a worse answer to the same prompt.

With pi the policy, r the reference, y_w the chosen and y_l the rejected answer to x:

    log-ratio  d(y) = log pi(y | x) - log r(y | x),    margin  z = beta (d(y_w) - d(y_l))
    sigmoid    -log sigmoid(z)                                       (https://arxiv.org/abs/2305.18290, eq. 7)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.config.fields import refused
from luthier.config.rules import Rule, Rules
from luthier.model.types import Models
from luthier.stages import LossOutput, Stage, StageState
from luthier.stages._logps import sequence_logps
from luthier.stages._pairs import NO_ANSWERS, NO_PACKING, NO_SPLIT, PAIRS, count_pairs, halves, is_real
from luthier.stages._reference import ReferenceConfig

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig(ReferenceConfig):
    pref_beta: float = 0.1
    """Strength of the pull towards the reference model; for orpo the weight of the odds ratio term."""
    pref_ftx: float = refused(0.0, "is not part of this version", "leave it out")
    """Weight of the plain sft loss on the chosen answer, added to the preference loss."""
    pref_bco_weight: float = refused(0.0, "is not part of this version", "leave it out")
    """Weight of the binary classifier loss mixed into the preference loss (https://arxiv.org/abs/2404.04656)."""
    pref_loss: Literal["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"] = "sigmoid"
    """Which preference loss."""
    dpo_label_smoothing: float = refused(0.0, "is not part of this version", "leave it out")
    """Share of the pairs taken to be labelled the wrong way round, 0 to 0.5."""
    simpo_gamma: float = refused(0.5, "is not part of this version", "leave it out")
    """Margin of SimPO (https://arxiv.org/abs/2405.14734)."""
    ld_alpha: float | None = refused(None, "is not part of this version", "leave it out")
    """Weight of the tokens beyond the length of the shorter answer (https://arxiv.org/abs/2409.06411)."""


RULES = Rules(
    (
        NO_SPLIT,
        *NO_PACKING,
        *NO_ANSWERS,
        Rule(
            ("pref_loss",),
            "is not part of this version",
            "use pref_loss: sigmoid",
            lambda run: run.method.pref_loss != "sigmoid",
        ),
    )
)


def asks_reference(run: "TrainRun") -> bool:
    return True


def loss(
    models: Models, batch: Mapping[str, Any], config: DpoConfig, *, state: StageState, training: bool
) -> LossOutput:
    """The sum over the pairs of a batch."""
    from torch.nn.functional import logsigmoid

    logps = sequence_logps(models, batch)
    rewards = halves(config.pref_beta * (logps.sums - batch["reference_logps"]))
    real = is_real(batch).to(logps.sums.dtype)
    margins = rewards.chosen - rewards.rejected
    count = float(real.sum())

    def total(values: Any) -> Any:
        return (values.detach() * real).sum()

    metrics = {
        "rewards/chosen": (total(rewards.chosen), count),
        "rewards/rejected": (total(rewards.rejected), count),
        "rewards/accuracies": (total((margins > 0).to(real.dtype)), count),
        "rewards/margins": (total(margins), count),
        "logps/chosen": (total(halves(logps.sums).chosen), count),
        "logps/rejected": (total(halves(logps.sums).rejected), count),
        "logits/chosen": (total(halves(logps.mean_logits).chosen), count),
        "logits/rejected": (total(halves(logps.mean_logits).rejected), count),
    }
    return LossOutput((-logsigmoid(margins) * real).sum(), metrics)


STAGE = Stage(
    name="dpo",
    config=DpoConfig,
    rows=PAIRS,
    asks_reference=asks_reference,
    units=count_pairs,
    loss=loss,
    check=RULES,
)
