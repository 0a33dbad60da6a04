"""What a training stage is. Each other file in this folder is one stage; its file name is its YAML name.

A stage is a value: `luthier.workflow.training` and `luthier.training.trainer` run any stage and never branch on its
name.
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

Sums = Mapping[str, "tuple[Tensor, float | Tensor]"]
"""Name -> (sum, count), not yet divided. A count that is computed on a device stays there: to read it is to wait."""
StageState = Mapping[str, float]
"""Name -> number: carried from one optimizer step to the next and saved in every checkpoint."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Sums, not means, so that a loss does not depend on how an optimizer step is split into micro-batches."""

    total: "Tensor"
    """Scalar: the sum of the loss over the units of this batch."""
    metrics: Sums = field(default_factory=dict)
    """Logged with the loss."""


def no_derived_metrics(means: Mapping[str, float]) -> Mapping[str, float]:
    return {}


def loss_alone(config: Any) -> tuple[str, ...]:
    return ()


def no_frozen_models(run: "TrainRun") -> "tuple[FrozenModelSpec, ...]":
    return ()


def keep_means(state: StageState, means: Mapping[str, tuple[float, float]], config: Any) -> StageState:
    return {name: mean for name, (mean, _) in means.items()}


@dataclass(frozen=True, slots=True)
class FrozenModelSpec:
    """A frozen model that the loss compares the policy with, such as a reference or a teacher."""

    name: str
    """Its key in `Models.frozen`."""
    key: str
    """The run-file key that names it."""
    source: str | None
    """Folder, GGUF file or hub id; None: the policy at the start of training."""
    adapters: tuple[str, ...] = ()
    """Merged into the model in this order."""
    bits: int | None = None
    """Bits of its linear layers, 4 or 8; None: as saved."""
    is_cached: bool = False
    """True: every row is scored once before training and carries the log-probabilities of its answers
    (`reference_logps`); the model is not kept in memory. False: the loss runs the model at every step."""


@dataclass(frozen=True, kw_only=True)
class StepStatistics:
    """Statistics of a whole optimizer step that the loss needs before the first micro-batch, e.g. the mean KL of kto.

    Computed without gradients over all micro-batches of all processes, so they do not depend on how the step is split.
    """

    sums: Callable[..., Sums]
    """(models, batch, config, *, state) -> sums over one batch."""
    update: Callable[[StageState, Mapping[str, tuple[float, float]], Any], StageState] = keep_means
    """(state, name -> (mean, count) over the step, config) -> the state for this step."""


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """What the user sees of a stage besides its loss."""

    headline: tuple[str, ...] = ()
    """Metrics on the progress line, most important first."""
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] = no_derived_metrics
    """(means of a log line or an evaluation) -> metrics derived from them, such as a difference of two means."""
    warns: Callable[[Mapping[str, float]], str] | None = None
    """(means of a log line) -> what keeps the run from learning, told once; empty if nothing does."""
    evaluated: Callable[[Any], tuple[str, ...]] = loss_alone
    """(config) -> the metrics of an evaluation besides its loss, which `metric_for_best_model` may name."""
    predict: "Callable[..., list[dict[str, Any]]] | None" = None
    """(models, batch, config) -> one line of generated_predictions.jsonl per row; None: the model generates answers
    instead."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training method. Rows are plain dicts of integer lists; a batch is a dict of tensors."""

    name: str
    config: type
    """The YAML keys that only this stage reads."""
    rows: RowPlan
    """How an example becomes rows."""
    head: Literal["language_model", "score"] = "language_model"
    """What the model outputs: logits over the vocabulary, or one score per text (a reward model)."""
    reads: Literal["cross_entropy", "logps"] = "logps"
    """How the loss reads logits, which decides what is in memory with them: all at once as a cross-entropy, or as
    log-probabilities that the backward pass computes again."""
    num_learned_parts: int | None = None
    """How many parts of a row the loss has a gradient of, the first ones; None: all."""
    has_dropout: bool = True
    """Whether dropout is active during training. Without it the log-probability of an answer is deterministic."""
    frozen_models: "Callable[[TrainRun], tuple[FrozenModelSpec, ...]]" = no_frozen_models
    """The frozen models that the loss compares the policy with."""
    units: Callable[[Mapping[str, Any]], float]
    """How many units (labeled tokens, pairs, ...) the loss of this batch sums over."""
    loss: Callable[..., LossOutput]
    """(models, batch, config, *, state, training) -> LossOutput. Two targets of a batch may have the same position
    (`luthier.data.shared_prefixes`)."""
    statistics: StepStatistics | None = None
    """Statistics of the whole optimizer step that the loss needs, if any."""
    rollout: "Callable[[Any], Rollout | None]" = lambda config: None
    """(config) -> how answers to train on are sampled, if they are; rows are prompts then."""
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
