"""From what a user wrote to a frozen, typed run. Nothing here imports torch.

source -> interpolate -> decode -> key_table (who reads what) -> load (with rules/) -> runs
"""
