"""What a training stage is. Each other file in this folder is one stage; its file name is its YAML name.

A stage is a value: the one workflow (`luthier.workflow.training`) and the one trainer (`luthier.training.trainer`) take
it as it is, and never ask for its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from luthier.config.rules.engine import NO_RULES, Rules
from luthier.data.rows.row_plan import RowPlan

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.config.runs import TrainRun
    from luthier.stages._rollout import Rollout

Sums = Mapping[str, "tuple[Tensor, float]"]
"""Name -> (sum, count), not yet divided."""
StageState = Mapping[str, float]
"""Name -> number: what a stage remembers from one optimizer step to the next. It is saved with every checkpoint."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Numbers not yet divided, so that a loss does not depend on how an optimizer step was cut into batches."""

    total: "Tensor"
    """Scalar: the sum of the loss over the units of this batch."""
    metrics: Sums = field(default_factory=dict)
    """What is logged beside the loss."""


def nothing_more(means: Mapping[str, float]) -> Mapping[str, float]:
    return {}


def no_frozen_models(run: "TrainRun") -> "tuple[FrozenModelSpec, ...]":
    return ()


def keep_means(state: StageState, means: Mapping[str, tuple[float, float]], config: Any) -> StageState:
    return {name: mean for name, (mean, _) in means.items()}


@dataclass(frozen=True, slots=True)
class FrozenModelSpec:
    """A model that a loss compares the policy with and that is not trained: a reference, a teacher."""

    name: str
    """The loss finds it under this name in `Models.frozen`."""
    key: str
    """The key of the run file that names it."""
    source: str | None
    """Folder, GGUF file or hub id; None: the policy as training begins."""
    adapters: tuple[str, ...] = ()
    """Merged into it in this order."""
    bits: int | None = None
    """Bits of its linear layers, 4 or 8; None: as they are saved."""
    is_cached: bool = False
    """Every row is scored once, before training: rows carry the log-probability of each of their answers
    (`reference_logps`), and the model is not kept in memory. False: the loss runs it at every step."""


@dataclass(frozen=True, kw_only=True)
class StepStatistics:
    """What a loss has to know of the whole optimizer step before its first batch, such as the mean divergence of kto.

    Computed without gradients over all batches of all processes, so it does not depend on how the step was cut.
    """

    sums: Callable[..., Sums]
    """(models, batch, config, *, state) -> sums over one batch."""
    update: Callable[[StageState, Mapping[str, tuple[float, float]], Any], StageState] = keep_means
    """(state, name -> (mean, count) over the step, config) -> the state for this step."""


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """What a user sees of a stage beside its loss."""

    headline: tuple[str, ...] = ()
    """Metrics on the progress line, most important first."""
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] = nothing_more
    """(means of a log line or an evaluation) -> metrics made of them, such as a difference of two means."""
    predict: "Callable[..., list[dict[str, Any]]] | None" = None
    """(models, batch, config) -> one line of generated_predictions.jsonl for each row of a batch; None: the model
    generates answers instead."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training method. Rows are plain dicts of integer lists; a batch is a dict of tensors."""

    name: str
    config: type
    """The YAML keys that only this stage reads."""
    rows: RowPlan
    """From an example to rows."""
    head: Literal["language_model", "score"] = "language_model"
    """What the model puts out: logits over the vocabulary, or one number for a text (a reward model)."""
    has_dropout: bool = True
    """Whether dropout is active in training; without it, log-probabilities of an answer are not left to chance."""
    frozen_models: "Callable[[TrainRun], tuple[FrozenModelSpec, ...]]" = no_frozen_models
    """The models that the loss compares the policy with."""
    units: Callable[[Mapping[str, Any]], float]
    """How many units (labelled tokens, pairs, ...) the loss of this batch sums over."""
    loss: Callable[..., LossOutput]
    """(models, batch, config, *, state, training) -> LossOutput."""
    statistics: StepStatistics | None = None
    """What the loss has to know of the whole optimizer step first, if anything."""
    rollout: "Callable[[Any], Rollout | None]" = lambda config: None
    """(config) -> how it learns from answers of the model's own, if it does; rows are prompts then."""
    reporting: Reporting = Reporting()
    check: Rules = NO_RULES
    """Rules between keys that concern this stage; checked before torch is imported."""
    supports_router_loss: bool = False
    """Whether the loss can add the balance loss of a mixture of experts (`moe_aux_loss_coef`)."""
    supports_skipped_tokens: bool = False
    """Whether the loss is defined for a model whose blocks skip tokens while training (`mixture_of_depths`)."""


def cached_reference(stage: Stage, run: "TrainRun") -> FrozenModelSpec | None:
    """The frozen model that scores every row before training, if the stage has one in this run."""
    return next((spec for spec in stage.frozen_models(run) if spec.is_cached), None)
