"""The header of a GGUF file, read without any library: which architecture it holds, and whether the file is whole.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian:
magic "GGUF", version u32, number of tensors u64, number of keys u64, then the keys (name, type, value), then the tensor
table (name, dimensions, type, offset), then the tensors, aligned.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from luthier.core.errors import ModelError
from luthier.core.registry import nearest

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT_BYTES = 32
_LONGEST_STRING_BYTES = 1 << 26
"""A longer one means that the length itself is damaged."""


class _Damaged(Exception):
    """The bytes do not read as GGUF; the text says where."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    name: str
    num_elements: int
    kind: int
    """The number of its ggml type, e.g. 3 for Q4_1."""
    offset_bytes: int
    """From the start of the tensor data."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    path: Path
    architecture: str
    tensors: tuple[GgufTensor, ...]
    data_start_bytes: int
    keys: Mapping[str, Any]
    """Key -> number or text. Of lists only the name is kept."""


def read_header(path: Path) -> GgufHeader:
    """The header of `path`. Raises `ModelError` if it is not GGUF or is damaged."""
    stat = path.stat()
    return _read_once(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _read_once(path: Path, num_bytes: int, modified_ns: int) -> GgufHeader:
    """A command looks at a file several times: whether it is whole, what it needs in memory, what it holds."""
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except (_Damaged, struct.error, UnicodeDecodeError, OverflowError) as fault:
        raise ModelError(f"{path}: this is not a whole GGUF file ({fault}) -> download or convert it again") from fault


def _read(file: BinaryIO, path: Path) -> GgufHeader:
    if file.read(4) != b"GGUF":
        raise _Damaged("it does not start with the letters GGUF")
    version, num_tensors, num_keys = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3):
        raise _Damaged(f"its version is {version}, known are 2 and 3")
    keys = dict(_key(file) for _ in range(num_keys))
    architecture, alignment = keys.get("general.architecture"), keys.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES)
    if not isinstance(architecture, str):
        raise _Damaged("it names no architecture")
    if not isinstance(alignment, int) or alignment < 1:
        raise _Damaged(f"its tensors are aligned to {alignment!r} bytes")
    num_blocks = keys.get(f"{architecture}.block_count", 0)
    if not isinstance(num_blocks, int) or num_blocks > num_tensors:
        raise _Damaged(f"{num_blocks!r} blocks of {num_tensors:,} tensors")
    tensors = tuple(_tensor(file) for _ in range(num_tensors))
    start = -(-file.tell() // alignment) * alignment
    size = path.stat().st_size
    if tensors and start + max(tensor.offset_bytes for tensor in tensors) >= size:
        raise _Damaged(f"it ends after {size:,} bytes, in the middle of its tensors")
    return GgufHeader(path, architecture, tensors, start, keys)


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST_STRING_BYTES:
        raise _Damaged(f"a text of {length:,} bytes in its header")
    return file.read(length).decode("utf-8", errors="replace")


def _scalar(file: BinaryIO, kind: int) -> Any:
    return struct.unpack(_SCALARS[kind], file.read(struct.calcsize(_SCALARS[kind])))[0]


def _key(file: BinaryIO) -> tuple[str, Any]:
    name = _string(file)
    (kind,) = struct.unpack("<I", file.read(4))
    if kind in _SCALARS:
        return name, _scalar(file, kind)
    if kind == _STRING:
        return name, _string(file)
    if kind != _ARRAY:
        raise _Damaged(f"the unknown type {kind} in its header")
    kind, count = struct.unpack("<IQ", file.read(12))
    if kind == _STRING:
        for _ in range(count):
            _string(file)
    elif kind in _SCALARS:
        file.seek(count * struct.calcsize(_SCALARS[kind]), 1)
    else:
        raise _Damaged(f"a list of the unknown type {kind} in its header")
    return name, None


def _tensor(file: BinaryIO) -> GgufTensor:
    name = _string(file)
    (num_dimensions,) = struct.unpack("<I", file.read(4))
    if num_dimensions > 8:
        raise _Damaged(f"a tensor of {num_dimensions} dimensions")
    num_elements = 1
    for dimension in struct.unpack(f"<{num_dimensions}Q", file.read(8 * num_dimensions)):
        num_elements *= dimension
    kind, offset_bytes = struct.unpack("<IQ", file.read(12))
    return GgufTensor(name, num_elements, kind, offset_bytes)


def check_loadable(path: Path) -> GgufHeader:
    """Read the header and make sure that transformers can load what it announces. Imports transformers and gguf.

    Raises `ModelError` for a damaged file, an architecture or a number format that cannot be loaded.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header = read_header(path)
    supported = supported_architectures()
    if _plain(header.architecture) not in map(_plain, supported):
        close = nearest(header.architecture, supported)
        hint = f" (the nearest is {close[0]})" if close else ""
        raise ModelError(
            f"{path}: GGUF files of the architecture {header.architecture!r} cannot be loaded{hint}; these can: "
            f"{', '.join(supported)} -> use the model's safetensors folder or hub id instead"
        )
    end = path.stat().st_size - header.data_start_bytes
    for tensor in header.tensors:
        if tensor.kind not in GGMLQuantizationType._value2member_map_:
            raise ModelError(f"{path}: the tensor {tensor.name} has the unknown number format {tensor.kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        if tensor.offset_bytes + tensor.num_elements // block * block_bytes > end:
            raise ModelError(
                f"{path}: this is not a whole GGUF file (it ends inside the tensor {tensor.name}) -> download it again"
            )
    return header


def supported_architectures() -> tuple[str, ...]:
    """The GGUF architectures that the installed transformers can load."""
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    not_architectures = {"general", "tokenizer"}  # transformers keeps these keys in the same table
    return tuple(sorted({*GGUF_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - not_architectures))


def _plain(architecture: str) -> str:
    """`qwen2moe`, `gpt-oss` and `minimax-m2` are `qwen2_moe`, `gpt_oss` and `minimax_m2` in transformers."""
    return architecture.replace("-", "").replace("_", "")
