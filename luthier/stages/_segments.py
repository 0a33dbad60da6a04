"""Sums over the tokens of each sequence, for which the host waits for no device.

B sequences, K tokens in total.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IN_ORDER = ("cpu", "cuda")
"""Devices on which PyTorch adds up the parts of a tensor one after the other."""


def summed(values: "Tensor", rows: "Tensor", num_rows: int) -> "Tensor":
    """values (K,) and rows (K,), the sequence of each, ascending -> (B,).

    The same numbers have the same sum, to the last bit. `index_add` on a GPU adds in the order in which its threads
    arrive, so a resumed run would not repeat the losses of an uninterrupted one.
    """
    import torch

    if values.device.type not in IN_ORDER:
        return values.new_zeros(num_rows).index_add(0, rows, values)
    # Unchecked: the check would wait for the device.
    return torch.segment_reduce(values, "sum", lengths=counted(rows, num_rows), unsafe=True)


def counted(rows: "Tensor", num_rows: int) -> "Tensor":
    """rows (K,), the sequence of each token, ascending -> (B,) the tokens of each sequence.

    As `bincount`, which on a device asks for the smallest and the largest number first.
    """
    import torch

    return torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device)).diff()
