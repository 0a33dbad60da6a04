"""Keys that matter only while rows are streamed."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingConfig:
    buffer_size: int = 16384
    """Rows held ready to draw from at random."""
