"""What only a GPU can show; see `benchmarks/check_gpu.py`.

world      a random Llama of a billion weights (or a tiny one), rows of its tokens
results    one check: its figures, or why it failed or was skipped
checks     the groups of checks; each runs in a process of its own, since a fault of a kernel ends its process
"""
