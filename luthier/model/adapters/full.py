"""Train every weight of the model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FullConfig:
    """Keys that only `finetuning_type: full` reads: none yet."""
