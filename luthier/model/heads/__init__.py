"""From hidden states to losses, log-probabilities, scores and values, without the logits of all positions."""
