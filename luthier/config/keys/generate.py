"""The keys that say how text is generated: in chat, and for `predict_with_generate`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratingConfig:
    do_sample: bool = True
    """Sample the next token; false takes the most likely one."""
    temperature: float = 0.95
    """Sampling temperature: logits are divided by it; 0 takes the most likely token."""
    top_p: float = 0.7
    """Sample from the smallest set of tokens whose probabilities add up to this."""
    top_k: int = 50
    """Sample from this many most likely tokens; 0 for all."""
    num_beams: int = 1
    """Beams of beam search; 1 is no beam search."""
    max_length: int = 1024
    """Longest prompt plus answer, in tokens; read only if `max_new_tokens` is not above 0."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that have occurred already."""
    length_penalty: float = 1.0
    """Exponent of the length in the score of a beam."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text that is shown."""
