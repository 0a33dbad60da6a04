"""Do the weights of a model fit into memory? Read off the headers of its files, before a byte of them is loaded.

Only what is clearly impossible is an error: weights that are alone larger than the memory that is free. Training needs
several times as much, and what it needs depends on the batch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.core.files import size
from luthier.core.machine import available_memory_bytes
from luthier.model.gguf import read_header
from luthier.model.sources import Source, read_safetensors_header, weight_files

if TYPE_CHECKING:
    import torch

_STORED_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Every other format of safetensors takes a byte or less."""


def check_memory(source: Source, dtype: "torch.dtype") -> None:
    """Raises `ModelError` if the weights of a local model, held in `dtype`, are larger than the free memory."""
    free_bytes = available_memory_bytes()
    needed_bytes = weight_bytes(source, dtype.itemsize)
    if free_bytes is None or needed_bytes <= free_bytes:
        return
    smaller = "load it in 16 bits (bf16: true or infer_dtype: bfloat16), " if dtype.itemsize > 2 else ""
    raise ModelError(
        f"{source}: its weights take {size(needed_bytes)} of memory in {str(dtype).removeprefix('torch.')}, and "
        f"{size(free_bytes)} are free -> {smaller}take a smaller model, or free some memory"
    )


def weight_bytes(source: Source, bytes_per_number: int) -> int:
    """What the weights take in memory; 0 where their files do not tell (the hub, files of PyTorch)."""
    if not source.is_local:
        return 0
    return sum(count * width for count, width in _tensors(source, bytes_per_number))


def _tensors(source: Source, bytes_per_number: int) -> Iterator[tuple[int, int]]:
    """(numbers, bytes of one number) for each tensor. Floating-point numbers take the format of the model."""
    folder = Path(source.name)
    if source.gguf_file:
        for tensor in read_header(folder / source.gguf_file).tensors:
            yield tensor.num_elements, bytes_per_number
        return
    for file in weight_files(folder):
        for name, tensor in read_safetensors_header(file).items() if file.suffix == ".safetensors" else ():
            if name == "__metadata__":
                continue
            count = 1
            for length in tensor["shape"]:
                count *= length
            is_float = tensor["dtype"] in ("F64", "F32", "F16", "BF16")
            yield count, bytes_per_number if is_float else _STORED_BYTES.get(tensor["dtype"], 1)
