"""What a computation reads of its tensors. On an accelerator the host waits for every such number."""

import traceback
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NUMBERS = {"item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__"}
SIZES = {"nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "masked_select", "equal"}
"""Of which the size or the answer depends on numbers."""
PICKS = {"__getitem__", "__setitem__", "index_put", "index_put_"}


class Reads(TorchFunctionMode):
    """While open, `found` gets the names of the calls that read, and the files that make them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if _reads(function.__name__.removeprefix("_return_"), args, given):
            files = [frame.filename for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.found.append((function.__name__, files[-1].rpartition("/")[2]))
        return function(*args, **given)


def _reads(name: str, args: Any, given: Any) -> bool:
    if name == "repeat_interleave":
        return isinstance(args[1], torch.Tensor) and "output_size" not in given
    if name in PICKS:
        where = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(one, torch.Tensor) and one.dtype is torch.bool for one in where)
    return name in NUMBERS | SIZES
