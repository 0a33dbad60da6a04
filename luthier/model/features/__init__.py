"""What a feature is: a change to a model that a few keys ask for. Each other file here is one feature.

A feature changes the config before the model is built (`on_config`), or the model when its weights are in place
(`on_model`). `luthier.model.loading.features` applies all features, in the order written there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import NO_RULES, Rules
from luthier.core.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What training asks of a model."""

    cutoff_len: int
    """Tokens of the longest row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """What a model is loaded for."""

    name: str
    """The model as the user named it, for messages."""
    machine: Machine
    adapter_folder: Path | None = None
    """The last of the given adapters."""
    training: Training | None = None
    """None for generation, export and frozen models."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    name: str
    config: type
    """The YAML keys that only this feature reads."""
    check: Rules = NO_RULES
    """Rules between keys that concern this feature, for every command; checked before torch is imported."""
    on_config: "Callable[[Any, PreTrainedConfig, Purpose], None] | None" = None
    """(keys, config of the model, purpose): changes the config in place. Raises `ModelError`."""
    on_model: "Callable[[Any, PreTrainedModel, Purpose], None] | None" = None
    """(keys, model, purpose): changes the model in place. Raises `ModelError`."""
