"""What a training stage is. Each other file in this folder is one stage; its file name is its YAML name.

A stage is a value: the one workflow (`luthier.workflow.training`) and the one trainer (`luthier.training.trainer`) take
it as it is, and never ask for its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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


def keep_means(state: StageState, means: Mapping[str, tuple[float, float]], config: Any) -> StageState:
    return {name: mean for name, (mean, _) in means.items()}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A network that a loss asks while training, beside the policy."""

    name: str
    """Under which the loss finds it in `Models.companions`."""
    key: str
    """The key of the run that names it."""
    source: str | None
    """Folder, GGUF file or hub id; None: the policy as training began."""
    adapters: tuple[str, ...] = ()
    """Merged into it in this order."""
    bits: int | None = None
    """Of its linear layers, 4 or 8; None as they are saved."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a loss has to know of the whole optimizer step before its first batch, such as the mean divergence of kto.

    Taken without gradients over all batches of all processes, so that it does not depend on how the step was cut.
    """

    sums: Callable[..., Sums]
    """(models, batch, config, *, state) -> sums over one batch."""
    learn: Callable[[StageState, Mapping[str, tuple[float, float]], Any], StageState] = keep_means
    """(state, name -> (mean, count) over the step, config) -> the state for this step."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training method. Rows are plain dicts of integer lists; a batch is a dict of tensors."""

    name: str
    config: type
    """The YAML keys that only this stage understands."""
    rows: RowPlan
    """From an example to rows."""
    learns_all: bool = False
    """Whether every token is learned, so that exp(loss) is the perplexity of the text and worth reporting."""
    scores: bool = False
    """Whether the model gives one number for a text (a reward model) instead of words."""
    asks_reference: "Callable[[TrainRun], bool]" = lambda run: False
    """Whether rows carry the log-probability that a reference model gives to the answer of each part."""
    has_dropout: bool = True
    """Whether dropout acts while training; without it what the model says of an answer is not left to chance."""
    wants: "Callable[[TrainRun], tuple[Wanted, ...]]" = lambda run: ()
    """The networks that the loss asks at every step."""
    units: Callable[[Mapping[str, Any]], float]
    """How many units (labelled tokens, pairs, ...) the loss of this batch sums over."""
    loss: Callable[..., LossOutput]
    """(models, batch, config, *, state, training) -> LossOutput."""
    predict: "Callable[..., list[dict[str, Any]]] | None" = None
    """(models, batch, config) -> what the model says of each row of a batch, for generated_predictions.jsonl; None: the
    model writes answers."""
    rollout: "Callable[[Any], Rollout | None]" = lambda config: None
    """(config) -> how it learns from answers of the model's own, if it does; rows are prompts then."""
    survey: Survey | None = None
    """What the loss has to know of the whole optimizer step first, if anything."""
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] = nothing_more
    """(the means of a log line or an evaluation) -> metrics made of them, such as a difference of two means."""
    check: Rules = NO_RULES
    """Rules between keys that concern this stage; checked before torch is imported."""
    supports_router_loss: bool = False
    """Whether the loss can add the balance loss of a mixture of experts (`moe_aux_loss_coef`)."""
    supports_skipped_tokens: bool = False
    """Whether the loss is defined for a model whose blocks skip tokens while training (`mixture_of_depths`)."""
