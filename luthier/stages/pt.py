"""(Continued) pre-training: next-token cross-entropy on every token of plain text, in blocks of `cutoff_len` tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PtConfig:
    """Keys that only `stage: pt` reads: none yet."""
