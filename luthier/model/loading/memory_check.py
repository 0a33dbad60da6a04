"""Do the weights of a model fit into memory? Computed from the headers of its files, before they are loaded.

Only what is clearly impossible is an error: weights that are alone larger than the memory that is free. Training needs
several times as much, and what it needs depends on the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError, RunFailed
from luthier.core.files import size
from luthier.core.log import warn
from luthier.core.machine import available_memory_bytes
from luthier.model.files.gguf.header import read_header
from luthier.model.files.sources import ModelSource

if TYPE_CHECKING:
    import torch

SHARE_FOR_WEIGHTS = 0.8
"""Of the free memory; the rest is for what is computed."""
_STORED_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Every other format of safetensors takes a byte or less."""


def check_memory(source: ModelSource, dtype: "torch.dtype") -> None:
    """Raises `ModelError` if the weights of a local model, held in `dtype`, are larger than the free memory."""
    free_bytes = available_memory_bytes()
    needed_bytes = weight_bytes(source, dtype.itemsize)
    if free_bytes is None or needed_bytes <= free_bytes:
        return
    smaller = "load it in 16 bits (bf16: true or infer_dtype: bfloat16), " if dtype.itemsize > 2 else ""
    raise ModelError(
        f"{source.files}: its weights take {size(needed_bytes)} of memory in {str(dtype).removeprefix('torch.')}, and "
        f"{size(free_bytes)} are free -> {smaller}take a smaller model, or free some memory"
    )


REFUSALS = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""What the system says, CUDA for memory beside PyTorch's allocator, and its libraries (cuBLAS, cuDNN)."""


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether an accelerator or the system refused memory; torch has a class of its own for its allocator only."""
    import torch

    is_refused = any(words in str(fault) for words in REFUSALS)
    return isinstance(fault, torch.OutOfMemoryError | MemoryError) or is_refused


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """While open, or around a function, a refusal of memory becomes `RunFailed`, which says what the library says: how
    much was asked for, and of an accelerator how much it has and how much is free."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        raise RunFailed(f"there is not enough memory: {str(fault) or 'MemoryError'} -> {remedy}") from fault


def placement(
    source: ModelSource, dtype: "torch.dtype", device_map: Any, offload_folder: str | None, *, is_low_bit: bool
) -> dict[str, Any]:
    """Where the weights go, as arguments of `from_pretrained`.

    With a `device_map` they are spread over devices and memory, and what is left over is read from `offload_folder`
    when it is needed. Without one they stay in memory; if that is too small, they are spread over memory and disk where
    there is an `offload_folder`. `is_low_bit`: their size is not that of `dtype`. Raises as `check_memory` does.
    """
    if device_map is not None:
        return {"device_map": device_map, "offload_folder": offload_folder}
    if is_low_bit:
        return {}
    if offload_folder is None:
        check_memory(source, dtype)
        return {}
    free_bytes, needed_bytes = available_memory_bytes(), weight_bytes(source, dtype.itemsize)
    if free_bytes is None or needed_bytes <= free_bytes:
        return {}
    warn(
        f"{source.files}: its weights take {size(needed_bytes)} of memory and {size(free_bytes)} are free, so a part of"
        " them is read from disk for every token, which is slow"
    )
    room = {"cpu": int(free_bytes * SHARE_FOR_WEIGHTS)}
    return {"device_map": "auto", "offload_folder": offload_folder, "max_memory": room}


def weight_bytes(source: ModelSource, bytes_per_number: int) -> int:
    """What the weights take in memory; 0 where their files do not tell (they are still on the hub, or of PyTorch)."""
    if not source.has_weights_here:
        return 0
    return sum(count * width for count, width in _tensors(source, bytes_per_number))


def _tensors(source: ModelSource, bytes_per_number: int) -> Iterator[tuple[int, int]]:
    """(numbers, bytes of one number) for each tensor. Floating-point numbers take the format of the model."""
    files = source.files
    if files.gguf_file:
        for tensor in read_header(Path(files.name) / files.gguf_file).tensors:
            yield tensor.num_elements, bytes_per_number
        return
    for header in source.headers.values():
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            count = 1
            for length in tensor["shape"]:
                count *= length
            is_float = tensor["dtype"] in ("F64", "F32", "F16", "BF16")
            yield count, bytes_per_number if is_float else _STORED_BYTES.get(tensor["dtype"], 1)
