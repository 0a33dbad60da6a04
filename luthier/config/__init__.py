"""From the words a user wrote to a frozen, typed run. Nothing here imports torch.

source -> interpolate -> decode -> keys (who owns what) -> load -> runs
"""
