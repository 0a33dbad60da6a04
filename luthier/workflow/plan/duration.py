"""How long the steps of a run take: their operations, and how fast this machine multiplies matrices.

The speed is measured on a product of the model's own size, once in a process. Training reaches a part of it, since it
also does what is not a matrix product; the part was measured with SmolLM2-135M on two cores. Where products are faster
than there for the same memory, as in bfloat16 with matrix instructions, the part is smaller and a run takes longer.
"""

import time
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARE_REACHED = {4: 0.56, 2: 0.43}
"""Bytes of a number -> share of the measured speed that training reaches."""
NUM_ROWS = 512
SECONDS_TO_MEASURE = 0.15


@lru_cache
def operations_per_second(dtype: "torch.dtype", device: str, size: int) -> float:
    """Of a product (512, size) x (size, size), the best of those that fit into a sixth of a second."""
    import torch

    left, right = (torch.ones(rows, size, dtype=dtype, device=device) for rows in (NUM_ROWS, size))
    best, end = float("inf"), time.perf_counter() + SECONDS_TO_MEASURE
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return 2 * NUM_ROWS * size * size / best


def seconds_for(num_operations: float, dtype: "torch.dtype", device: str, size: int) -> tuple[float, str]:
    """(seconds, what they rest on)."""
    speed, share = operations_per_second(dtype, device, size), SHARE_REACHED.get(dtype.itemsize, 0.43)
    basis = (
        f"{num_operations / 1e12:,.3g} TFLOP of matrix products at {share:.0%} of {speed / 1e9:,.0f} GFLOP/s, measured"
        f" here just now in {str(dtype).removeprefix('torch.')}; without start-up, evaluation and saving"
    )
    return num_operations / (speed * share), basis
