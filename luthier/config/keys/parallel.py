"""Keys of runs whose processes share the tokens of a batch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    sp_size: int = 1
    """Number of processes that share the tokens of each batch, for long contexts (sequence parallelism)."""
