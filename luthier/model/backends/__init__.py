"""What a backend is: who loads a model and computes with it. Each other file here is one backend.

`luthier.model.backends.transformers` is the one that runs when no key asks for another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.kinds import BACKENDS
from luthier.core.machine import Machine, detect
from luthier.model.files.sources import ModelSource, model_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.config.runs import InferRun, Run, TrainRun
    from luthier.model.attention import Trial
    from luthier.model.tokenizer import FittedTokenizer
    from luthier.model.types import LoadedModel

DEFAULT = "transformers"


@dataclass(frozen=True, kw_only=True)
class Backend:
    name: str
    is_chosen: "Callable[[Run], bool]" = lambda run: False
    """Whether a run asks for it."""
    prepare_arguments: "Callable[[Any, TrainRun, Machine], None]" = lambda args, run, machine: None
    """(TrainingArguments, run, machine): what the library needs to know before a model is loaded."""
    load_for_training: (
        "Callable[[TrainRun, ModelSource, FittedTokenizer, Machine, bool, int | None, Trial | None], LoadedModel]"
    )
    """(run, source, tokenizer, machine, scores, recomputed_layers, trial) -> the model, with its trainable parameters
    settled.

    `recomputed_layers`: how many layers gradient checkpointing computes again; None: as the keys of the run say.
    `trial`: for a run with images, see `luthier.model.attention`; None: the rows have none."""
    load_for_inference: "Callable[[InferRun | TrainRun, ModelSource, Machine, bool], PreTrainedModel]"
    """(run, source, machine, scores) -> the model with its adapters, in evaluation mode."""


def backend_of(run: "Run") -> Backend:
    """The backend that a key of the run asks for, else `DEFAULT`."""
    backends: list[Backend] = [BACKENDS.get(name) for name in BACKENDS.names]
    return next((backend for backend in backends if backend.is_chosen(run)), BACKENDS.get(DEFAULT))


def load_for_training(
    run: "TrainRun",
    fitted: "FittedTokenizer",
    machine: Machine | None = None,
    *,
    source: ModelSource | None = None,
    scores: bool = False,
    recomputed_layers: int | None = None,
    trial: "Trial | None" = None,
) -> "LoadedModel":
    """The model of a training run. Raises `ModelError`.

    `source`: of the model, if it is located already. `scores`: load a reward model instead of a language model.
    `recomputed_layers`, `trial`: see `Backend.load_for_training`.
    """
    source = source or model_source(run.model)
    load = backend_of(run).load_for_training
    return load(run, source, fitted, machine or detect(), scores, recomputed_layers, trial)


def load_for_inference(
    run: "InferRun | TrainRun",
    machine: Machine | None = None,
    *,
    source: ModelSource | None = None,
    scores: bool = False,
) -> "PreTrainedModel":
    """The model of a run with its adapters, in evaluation mode. `source` and `scores` as in `load_for_training`."""
    return backend_of(run).load_for_inference(run, source or model_source(run.model), machine or detect(), scores)
