"""Rewards for examples/grpo.yaml and examples/ppo.yaml: one number for each answer of the model."""


def five_words(completions: list[str]) -> list[float]:
    """1 for an answer of exactly five words, 1/8 less for every word more or less, 0 at the lowest."""
    return [max(0.0, 1 - abs(len(text.split()) - 5) / 8) for text in completions]
