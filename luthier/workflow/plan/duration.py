"""How long the steps of a run take: their operations, and how fast this machine multiplies and moves memory.

Each operation takes as long as its products or its reading and writing, whichever is longer (the roofline model,
https://doi.org/10.1145/1498765.1498785). Both speeds are measured with tensors of the model's own size, once in a
process. On a CPU products with a short side, as those of LoRA, or in another format, as those of Muon, are timed one by
one in their own shapes: they are far slower than large ones.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

from luthier.core.allocator import keep_freed_blocks
from luthier.workflow.plan.calls import Call, Calls, Product

if TYPE_CHECKING:
    import torch

NUM_ROWS, NUM_DEVICE_ROWS = 512, 8192
"""Of the timed product. An accelerator finishes a small one before the CPU has started the next."""
DECOMPOSED_SIZE = 512
MOST_TIMED_OPERATIONS = 4 * 10**9
SHORT_SIDE = 256
"""Products without a shorter side reach about the speed of the large one."""
KEPT_BYTES, KEPT_DEVICE_BYTES = 64 * 2**20, 512 * 2**20
"""More than the caches of a processor or an accelerator hold."""
MOST_TIMED_RUNS, SECONDS_TO_MEASURE = 8, 0.1
CALL_SECONDS = {"cpu": 12e-6}
"""What PyTorch, the model's Python code and autograd take for one operation, however small. An accelerator computes
meanwhile."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a machine, at the moment."""

    operations: float
    """Floating-point operations per second, of products."""
    num_bytes: float
    """Bytes read and written per second, where the result is new memory."""
    call_seconds: float
    times_products: bool = False
    """Whether small products are timed."""
    dtype: "torch.dtype | None" = None
    """Of these products; None for any."""
    device: str = "cpu"

    def seconds_for(self, calls: Calls) -> float:
        return sum(count * (self._seconds_of(call) + self.call_seconds) for call, count in calls.items())

    def _seconds_of(self, call: Call) -> float:
        if call.decomposed is not None:
            return call.operations / decomposition_speed(self.device)
        if self.times_products and call.product is not None and self._is_timed(call.product, call.operations):
            return product_seconds(call.product)
        return max(call.operations / self.operations, call.num_bytes / self.num_bytes)

    def _is_timed(self, product: Product, operations: int) -> bool:
        is_short = min(product.rows, product.inner, product.columns) < SHORT_SIDE
        is_other = self.dtype is not None and product.dtype != self.dtype
        return (is_short or is_other) and operations <= MOST_TIMED_OPERATIONS


@lru_cache
def decomposition_speed(device: str) -> float:
    """Operations per second of a singular value decomposition, which is far slower than products."""
    import torch

    generator = torch.Generator().manual_seed(0)
    square = torch.randn(DECOMPOSED_SIZE, DECOMPOSED_SIZE, generator=generator).to(device)
    seconds = _best_seconds(lambda: torch.linalg.svd(square, full_matrices=False)[0])
    return 26 * DECOMPOSED_SIZE**3 / seconds  # as `luthier.workflow.plan.calls` counts them


@lru_cache(maxsize=256)
def product_seconds(product: Product) -> float:
    """Of a product on the CPU, the second time that it is computed."""
    from luthier.model.kernels.products import product as computed

    left = _matrix(product.rows, product.inner, product.is_left_transposed, product.dtype)
    right = _matrix(product.inner, product.columns, product.is_right_transposed, product.dtype)
    computed(left, right.T)
    start = time.perf_counter()
    computed(left, right.T)
    return time.perf_counter() - start


def _matrix(rows: int, columns: int, is_transposed: bool, dtype: "torch.dtype") -> "torch.Tensor":
    import torch

    return torch.ones(columns, rows, dtype=dtype).T if is_transposed else torch.ones(rows, columns, dtype=dtype)


@lru_cache
def measured_speed(dtype: "torch.dtype", device: str, size: int) -> Speed:
    """Of (512 or 8192, size) x (size, size), and of sums of such rows that are all kept, as activations are."""
    import torch

    from luthier.model.kernels.products import product as computed

    if device == "cpu":
        keep_freed_blocks()  # as in training
    num_rows, kept_bytes = (NUM_ROWS, KEPT_BYTES) if device == "cpu" else (NUM_DEVICE_ROWS, KEPT_DEVICE_BYTES)
    rows, square = (torch.ones(count, size, dtype=dtype, device=device) for count in (num_rows, size))
    num_kept = -(-kept_bytes // rows.nbytes)
    product = _best_seconds(lambda: computed(rows, square.T))
    additions = _best_seconds(lambda: reduce(_kept_sum, range(num_kept), [rows])[-1])
    num_bytes = 3 * rows.nbytes * num_kept
    return Speed(
        2 * num_rows * size * size / product,
        num_bytes / additions,
        CALL_SECONDS.get(device, 0.0),
        times_products=device == "cpu",
        dtype=dtype,
        device=device,
    )


def _kept_sum(kept: "list[torch.Tensor]", _: int) -> "list[torch.Tensor]":
    kept.append(kept[-1] + kept[0])
    return kept


def _best_seconds(work: "Callable[[], torch.Tensor]") -> float:
    """The best of a few runs, after one that gets the memory."""
    work()
    best, end = float("inf"), time.perf_counter() + SECONDS_TO_MEASURE
    for _ in range(MOST_TIMED_RUNS):
        start = time.perf_counter()
        result = work()
        float(result[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best


def basis_of(calls: Calls, speed: Speed, dtype: "torch.dtype") -> str:
    """What the seconds rest on."""
    operations = sum(call.operations * count for call, count in calls.items())
    num_bytes = sum(call.num_bytes * count for call, count in calls.items())
    return (
        f"{operations / 1e12:,.3g} TFLOP of products at {speed.operations / 1e9:,.0f} GFLOP/s and"
        f" {num_bytes / 1e12:,.3g} TB of memory at {speed.num_bytes / 1e9:,.0f} GB/s, measured here just now in"
        f" {str(dtype).removeprefix('torch.')}; without start-up, evaluation and saving"
    )
