"""Supervised fine-tuning: next-token cross-entropy on the answers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    train_on_prompt: bool = False
    """Learn the prompt tokens as well as the answers."""
    mask_history: bool = False
    """Learn the last answer of a conversation only."""
    compute_accuracy: bool = False
    """Report next-token accuracy on the evaluation data."""
