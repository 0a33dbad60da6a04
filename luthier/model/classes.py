"""Which class of transformers a config belongs to: a language model, or one that scores (a reward model).

A config says so itself, in `architectures`: a reward model is a `...ForSequenceClassification` with one label. An
adapter that was trained as one says it too, by its task.
"""

import json
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig

_SCORES = "ForSequenceClassification"
ROUTED_KEY = "mixture_of_depths"
"""The entry in config.json of a mixture of depths that describes its routers."""
ROUTED_MODEL_TYPE = "luthier_mixture_of_depths"
"""The `model_type` in the config.json of such a model: a program without routers refuses it, instead of computing every
token in every block. The entry `ROUTED_KEY` has the type of the blocks."""
CACHE_NAMES = ("cache", "past_key_values")
"""What blocks call the keys and values of earlier tokens: since transformers 5.24, and before."""
SCORE_TASK = "SEQ_CLS"
"""What peft calls the task of an adapter whose model scores."""


def checkpoint_dtype(config: "PreTrainedConfig") -> "torch.dtype | None":
    """The number format the weights were saved in, if the config says."""
    import torch

    dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def auto_class(config: "PreTrainedConfig") -> Any:
    """The class of transformers that builds the model of this config."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    if gives_scores(config):
        return AutoModelForSequenceClassification
    for auto in (AutoModelForMultimodalLM, AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            return auto
    return AutoModelForCausalLM


def model_class(config: "PreTrainedConfig") -> type | None:
    """The class of the model itself, or None if it comes with the checkpoint (remote code)."""
    mapping = auto_class(config)._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def gives_scores(config: "PreTrainedConfig") -> bool:
    """Whether it is the config of a reward model."""
    return names_scorer(config.architectures)


def names_scorer(architectures: "Iterable[str] | None") -> bool:
    """The same of what a config.json names."""
    return any(name.endswith(_SCORES) for name in architectures or ())


def make_scorer(config: "PreTrainedConfig") -> None:
    """Turn the config of a language model into that of a reward model with the same backbone.

    Raises `ModelError` for an architecture of which transformers has no class that scores.
    """
    from transformers import AutoModelForSequenceClassification

    mapping = AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping or config.is_encoder_decoder:
        raise ModelError(
            f"stage: rm: transformers has no class for a reward model of the type {config.model_type}"
            f" (a ...{_SCORES} that scores the last token) -> use a model of another architecture"
        )
    found: Any = mapping[type(config)]
    config.architectures = [(found[0] if isinstance(found, (list, tuple)) else found).__name__]
    config.num_labels = 1


def adapter_gives_scores(folder: "Path") -> bool:
    """Whether the adapter in `folder` was trained as a reward model."""
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type") == SCORE_TASK


def require_kind(name: str, config: "PreTrainedConfig", *, scores: bool) -> None:
    """Raises `ModelError` if a language model is wanted and this is a reward model, or the other way round."""
    if gives_scores(config) and not scores:
        raise ModelError(
            f"{name}: this is a reward model: it scores a text and generates none"
            " -> name the model it was trained from, or use this one with stage: rm or as reward_model"
        )
    if scores and not gives_scores(config):
        raise ModelError(
            f"{name}: this model is a language model without a reward head"
            " -> train it with stage: rm first, or give the adapter of such a run beside it"
        )


def is_routed(config: "PreTrainedConfig") -> bool:
    """Whether the model of this config is a mixture of depths."""
    return bool(vars(config).get(ROUTED_KEY))


def require_dense(config: "PreTrainedConfig", what: str) -> None:
    """Raises `ModelError` if the model is a mixture of depths, with which `what` cannot be done."""
    if is_routed(config):
        raise ModelError(f"{what}: a mixture of depths has routers, for which there is no place -> use a dense model")
