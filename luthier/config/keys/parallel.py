"""Keys of runs whose processes share the tokens of a batch, or the layers of the model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    sp_size: int = 1
    """Number of processes that share the tokens of each batch, for long contexts (sequence parallelism)."""
    tp_size: int = 1
    """Number of processes that share each layer of the model (tensor parallelism)."""
